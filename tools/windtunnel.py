"""The paper's experiments as commands: python tools/windtunnel.py SUBCOMMAND --help."""

from __future__ import annotations

from minicpm_megatron.cli import at_once  # noqa: F401  # isort: skip

from pathlib import Path

from minicpm_megatron.cli.entry import run
from minicpm_megatron.cli.windtunnel.main import main

TRAIN = Path(__file__).resolve().parents[1] / "examples" / "train.py"

if __name__ == "__main__":
    run(lambda: main(TRAIN))
