"""Argument parsing and the exit-code contract shared by tools/ and examples/."""
