"""Entries for the registries of minicpm_megatron, found through the entry points in pyproject.toml."""
