"""Turn raw text into Megatron's .bin/.idx:

    python tools/preprocess_data.py --input CORPUS... --tokenizer DIR --output-prefix P --workers N

Reads .jsonl, .jsonl.gz, .jsonl.zst, .parquet (text under --json-key) and .txt (one document a file), and folders of
them. Writes P.bin, P.idx, P.json (what they are) and P.rejected.jsonl (every record that was no document). With
--validation-share 0.01 one document in a hundred goes to P.valid.bin and .idx instead. Killed and run again, it goes on
where it was.
"""

from __future__ import annotations

from minicpm_megatron.cli import at_once  # noqa: F401  # isort: skip

import argparse
import os
from dataclasses import replace

from minicpm_megatron.cli.arguments import Parser
from minicpm_megatron.cli.entry import run
from minicpm_megatron.data.join_units import rejected_path
from minicpm_megatron.data.preprocess import Options, preprocess


def main() -> None:
    """Parse the command line and tokenise."""
    default = Options()
    parser = Parser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="CORPUS", help="files or folders")
    parser.add_argument("--tokenizer", required=True, help="folder with tokenizer.model or tokenizer.json, or the file")
    parser.add_argument("--output-prefix", required=True, help="path of the outputs without suffix")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument(
        "--json-key", default=default.key, help=f"member or column of the text (default: {default.key})"
    )
    parser.add_argument(
        "--prepend-bos",
        action=argparse.BooleanOptionalAction,
        default=default.prepend_bos,
        help="put <s> before each document, as the tokenizer does before a prompt (default: yes)",
    )
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=default.append_eod,
        help="put </s> after each document (default: yes)",
    )
    parser.add_argument(
        "--on-error",
        choices=("skip", "fail"),
        default="skip",
        help="what a record that is no document does (default: skip, counted and reported)",
    )
    parser.add_argument(
        "--max-document-bytes",
        type=int,
        default=default.max_document_bytes,
        help=f"longer documents are rejected (default: {default.max_document_bytes})",
    )
    parser.add_argument(
        "--validation-share",
        type=float,
        default=default.validation_share,
        metavar="SHARE",
        help="of the documents, chosen by the hash of their text, for P.valid instead of P (default: none)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace another output at the same prefix")
    arguments = parser.parse_args()
    options = Options(
        arguments.json_key,
        arguments.prepend_bos,
        arguments.append_eod,
        arguments.max_document_bytes,
        arguments.on_error == "fail",
        arguments.validation_share,
    )
    if options.validation_share:  # first, since a share of too little text is refused
        _make(arguments, f"{arguments.output_prefix}.valid", replace(options, validation=True))
    _make(arguments, arguments.output_prefix, options)


def _make(arguments: argparse.Namespace, prefix: str, options: Options) -> None:
    """Tokenise to `prefix` and print what came of it."""
    made = preprocess(
        arguments.input,
        arguments.tokenizer,
        prefix,
        workers=arguments.workers,
        options=options,
        overwrite=arguments.overwrite,
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


if __name__ == "__main__":
    run(main)
