"""Train a tokenizer: python tools/train_tokenizer.py --input CORPUS... --vocab-size 32000 --output DIR

Writes tokenizer.model (sentencepiece), tokenizer.json and tokenizer_config.json (the same ids in transformers) and
tokenizer_report.json, and prints how many bytes of each input a token holds.
"""

from __future__ import annotations

from minicpm_megatron.cli import at_once  # noqa: F401  # isort: skip

from pathlib import Path

from minicpm_megatron.cli.arguments import Parser
from minicpm_megatron.cli.entry import run
from minicpm_megatron.data.corpus_files import SUFFIXES
from minicpm_megatron.data.tokenizer_training import compression_table, train_tokenizer
from minicpm_megatron.errors import UserError


def main() -> None:
    """Parse the command line and train."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="CORPUS",
        help=f"files ({', '.join(SUFFIXES)}) or folders of them; each is one line of the report",
    )
    parser.add_argument("--vocab-size", type=int, required=True, help="number of pieces, 256 bytes included")
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    parser.add_argument("--json-key", default="text", help="member or column that holds the text (default: text)")
    parser.add_argument(
        "--max-sample-mb", type=int, default=256, help="megabytes of text taken of each input at most (default: 256)"
    )
    arguments = parser.parse_args()
    if arguments.max_sample_mb < 1:
        raise UserError("must be at least 1", where="--max-sample-mb")
    report = train_tokenizer(
        arguments.input,
        arguments.vocab_size,
        arguments.output,
        key=arguments.json_key,
        max_sample_bytes=arguments.max_sample_mb << 20,
    )
    print(compression_table(report))
    print(f"tokenizer written to {arguments.output}")


if __name__ == "__main__":
    run(main)
