"""Convert a model between our checkpoints and published formats; the input's format is recognised.

python tools/convert_checkpoint.py --input runs/quickstart --to llama --output runs/quickstart/hf-llama
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from minicpm_megatron.checkpoint.find import newest_checkpoint
from minicpm_megatron.cli.entry import run
from minicpm_megatron.convert import TARGETS, convert
from minicpm_megatron.convert.operation import DEFAULT_DTYPE, DEFAULT_SHARD
from minicpm_megatron.convert.weight_files import DTYPES


def main() -> int:
    """Parse the arguments and convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input",
        type=Path,
        required=True,
        help="run (its newest checkpoint), checkpoint, or Hugging Face model folder",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to make; appears whole or not at all")
    parser.add_argument("--to", required=True, choices=TARGETS, help="format to write; megatron is our checkpoint")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help=f"type of published weights (default {DEFAULT_DTYPE})")
    parser.add_argument("--max-shard-size", default=DEFAULT_SHARD, help=f"for example 500MB (default {DEFAULT_SHARD})")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder (default: the one the input has or records)")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is already at --output")
    arguments = parser.parse_args()
    done = convert(
        newest_checkpoint(arguments.input),
        arguments.output,
        arguments.to,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        tokenizer=arguments.tokenizer,
        overwrite=arguments.overwrite,
        progress=sys.stderr.isatty(),
    )
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{done.source_format} -> {done.target_format}: {done.parameters:,} parameters in {done.output}")
    return 0


if __name__ == "__main__":
    run(main)
