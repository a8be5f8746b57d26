"""examples/train.py of an installed package: the wind tunnel's launcher starts this file."""

from minicpm_megatron.cli import at_once  # noqa: F401  # isort: skip

from minicpm_megatron.cli.entry import run
from minicpm_megatron.cli.train import main

if __name__ == "__main__":
    run(main)
