"""A preset, a decay shape, an observer and an objective for minicpm_megatron: the entry points in pyproject.toml."""
