"""A preset, a decay shape and a schedule for minicpm_megatron, found through the entry points in pyproject.toml."""
