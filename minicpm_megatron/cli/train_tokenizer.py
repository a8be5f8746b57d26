"""Train a tokenizer: minicpm train-tokenizer --input CORPUS... --vocab-size 32000 --output DIR

Writes tokenizer.model (sentencepiece), tokenizer.json and tokenizer_config.json (the same ids in transformers) and
tokenizer_report.json, and prints how many bytes of each input a token holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minicpm_megatron.cli.arguments import Parser
from minicpm_megatron.data.corpus_files import SUFFIXES
from minicpm_megatron.data.tokenizer_training import compression_table, train_tokenizer
from minicpm_megatron.errors import UserError


def parser() -> Parser:
    """Return the parser; `--help` is its documentation."""
    result = Parser(description=__doc__)
    result.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="CORPUS",
        help=f"files ({', '.join(SUFFIXES)}) or folders of them; each is one line of the report",
    )
    result.add_argument("--vocab-size", type=int, required=True, help="number of pieces, 256 bytes included")
    result.add_argument("--output", type=Path, required=True, help="new folder")
    result.add_argument("--json-key", default="text", help="member or column that holds the text (default: text)")
    result.add_argument(
        "--max-sample-mb", type=int, default=256, help="megabytes of text taken of each input at most (default: 256)"
    )
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    options = parser().parse_args(arguments)
    if options.max_sample_mb < 1:
        raise UserError("must be at least 1", where="--max-sample-mb")
    report = train_tokenizer(
        options.input,
        options.vocab_size,
        options.output,
        key=options.json_key,
        max_sample_bytes=options.max_sample_mb << 20,
    )
    print(compression_table(report))
    print(f"tokenizer written to {options.output}")
