"""`minicpm evaluate-retrieval` as a script. See --help."""

from minicpm_megatron.cli import at_once  # noqa: F401  # isort: skip

from minicpm_megatron.cli.entry import run
from minicpm_megatron.cli.evaluate_retrieval import main

if __name__ == "__main__":
    run(main)
