"""A preset and a decay shape for minicpm_megatron, found through the entry points in pyproject.toml."""
