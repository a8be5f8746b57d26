"""Turn raw text into Megatron's .bin/.idx:

    minicpm preprocess --input CORPUS... --tokenizer DIR --output-prefix P --workers N

Reads .jsonl, .jsonl.gz, .jsonl.zst, .parquet (text under --json-key) and .txt (one document a file), and folders of
them. Writes P.bin, P.idx, P.json (what they are) and P.rejected.jsonl (every record that was no document). With
--validation-share 0.01 one document in a hundred goes to P.valid.bin and .idx instead. Killed and run again, it goes on
where it was.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace

from minicpm_megatron.cli.arguments import Parser
from minicpm_megatron.data.join_units import rejected_path
from minicpm_megatron.data.preprocess import Options, preprocess


def parser() -> Parser:
    """Return the parser; `--help` is its documentation."""
    default = Options()
    result = Parser(description=__doc__)
    result.add_argument("--input", nargs="+", required=True, metavar="CORPUS", help="files or folders")
    result.add_argument("--tokenizer", required=True, help="folder with tokenizer.model or tokenizer.json, or the file")
    result.add_argument("--output-prefix", required=True, help="path of the outputs without suffix")
    result.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    result.add_argument(
        "--json-key", default=default.key, help=f"member or column of the text (default: {default.key})"
    )
    result.add_argument(
        "--prepend-bos",
        action=argparse.BooleanOptionalAction,
        default=default.prepend_bos,
        help="put <s> before each document, as the tokenizer does before a prompt (default: yes)",
    )
    result.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=default.append_eod,
        help="put </s> after each document (default: yes)",
    )
    result.add_argument(
        "--on-error",
        choices=("skip", "fail"),
        default="skip",
        help="what a record that is no document does (default: skip, counted and reported)",
    )
    result.add_argument(
        "--max-document-bytes",
        type=int,
        default=default.max_document_bytes,
        help=f"longer documents are rejected (default: {default.max_document_bytes})",
    )
    result.add_argument(
        "--validation-share",
        type=float,
        default=default.validation_share,
        metavar="SHARE",
        help="of the documents, chosen by the hash of their text, for P.valid instead of P (default: none)",
    )
    result.add_argument("--overwrite", action="store_true", help="replace another output at the same prefix")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and tokenise."""
    given = parser().parse_args(arguments)
    options = Options(
        given.json_key,
        given.prepend_bos,
        given.append_eod,
        given.max_document_bytes,
        given.on_error == "fail",
        given.validation_share,
    )
    if options.validation_share:  # first, since a share of too little text is refused
        _make(given, f"{given.output_prefix}.valid", replace(options, validation=True))
    _make(given, given.output_prefix, options)


def _make(given: argparse.Namespace, prefix: str, options: Options) -> None:
    """Tokenise to `prefix` and print what came of it."""
    made = preprocess(
        given.input,
        given.tokenizer,
        prefix,
        workers=given.workers,
        options=options,
        overwrite=given.overwrite,
    )
    print(
        f"{made.documents:,} documents, {made.tokens:,} tokens of {made.dtype}, {made.text_bytes:,} bytes of text"
        f" ({made.text_bytes / made.tokens:.3f} bytes/token)"
    )
    if made.rejected:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in made.rejected.items())
        print(
            f"rejected {made.records - made.documents:,} of {made.records:,} records: {counts}"
            f" (see {rejected_path(prefix)})"
        )
    print(f"written to {prefix}.bin and .idx")
