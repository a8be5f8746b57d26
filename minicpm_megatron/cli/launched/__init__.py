"""Scripts that launchers start where there is no checkout.

They have a folder to themselves, since Python puts a script's folder first on its path.
"""
