"""`minicpm train-tokenizer` as a script. See --help."""

from minicpm_megatron.cli import at_once  # noqa: F401  # isort: skip

from minicpm_megatron.cli.entry import run
from minicpm_megatron.cli.train_tokenizer import main

if __name__ == "__main__":
    run(main)
