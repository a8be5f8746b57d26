"""Make a small real corpus (English, Chinese, code): minicpm build-sample-corpus --output DIR [--size-mb 12]

Everything comes from Python, the installed packages and the texts that ship with this project; DIR/README.md names
each source with its licence.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minicpm_megatron.cli.arguments import Parser
from minicpm_megatron.data.sample_corpus import build_sample_corpus


def parser() -> Parser:
    """Return the parser; `--help` is its documentation."""
    result = Parser(description=__doc__)
    result.add_argument("--output", type=Path, required=True, help="new folder")
    result.add_argument("--size-mb", type=float, default=12, help="megabytes of text at most (default: 12)")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and build."""
    options = parser().parse_args(arguments)
    for name, row in build_sample_corpus(options.output, options.size_mb).items():
        print(f"{name + '.jsonl':<16} {row['documents']:>7,} documents {row['bytes']:>12,} bytes")
    print(f"corpus written to {options.output}")
