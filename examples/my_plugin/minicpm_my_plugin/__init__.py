"""Entries of several kinds for minicpm_megatron, found through the entry points in pyproject.toml."""
