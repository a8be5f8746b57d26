"""Make a small real corpus (English, Chinese, code): python tools/build_sample_corpus.py --output DIR [--size-mb 12]

Everything comes from Python, the installed packages and the texts that ship with this project; DIR/README.md names
each source with its licence.
"""

from __future__ import annotations

from minicpm_megatron.cli import at_once  # noqa: F401  # isort: skip

from pathlib import Path

from minicpm_megatron.cli.arguments import Parser
from minicpm_megatron.cli.entry import run
from minicpm_megatron.data.sample_corpus import build_sample_corpus


def main() -> None:
    """Parse the command line and build."""
    parser = Parser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    parser.add_argument("--size-mb", type=float, default=12, help="megabytes of text at most (default: 12)")
    arguments = parser.parse_args()
    for name, row in build_sample_corpus(arguments.output, arguments.size_mb).items():
        print(f"{name + '.jsonl':<16} {row['documents']:>7,} documents {row['bytes']:>12,} bytes")
    print(f"corpus written to {arguments.output}")


if __name__ == "__main__":
    run(main)
