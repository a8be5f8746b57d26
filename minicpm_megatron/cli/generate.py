"""Continue a prompt with a trained model:

    minicpm generate --checkpoint runs/quickstart --prompt "import os"

Takes a run (its newest checkpoint), RUN@STEP, one checkpoint, or an exported or downloaded Hugging Face folder.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from minicpm_megatron.checkpoint.find import find_source
from minicpm_megatron.cli.arguments import Parser
from minicpm_megatron.cli.interrupts import leaving_at_once
from minicpm_megatron.convert.sampling import Sampling
from minicpm_megatron.errors import UserError

COLDEST = 1e-6  # logits divided by less leave the range of fp32


def parser() -> Parser:
    """Return the parser; `--help` is its documentation."""
    default = Sampling()
    result = Parser(description=__doc__)
    result.add_argument("--checkpoint", required=True, help="run, RUN@STEP, checkpoint or Hugging Face folder")
    result.add_argument("--prompt", required=True, nargs="+", help="text to continue; several are done in turn")
    result.add_argument("--tokenizer", type=Path, help="tokenizer folder (default: the one that belongs to the model)")
    result.add_argument(
        "--max-new-tokens",
        type=int,
        default=default.max_new_tokens,
        help=f"a text ends after them, at an end token or with the model's context (default {default.max_new_tokens})",
    )
    result.add_argument(
        "--temperature",
        type=float,
        default=default.temperature,
        help=f"divides the logits before a draw; 0: the likeliest token each time (default {default.temperature})",
    )
    result.add_argument(
        "--top-p",
        type=float,
        default=default.top_p,
        help=f"draw from the likeliest tokens that make up this probability (default {default.top_p})",
    )
    result.add_argument("--seed", type=int, default=default.seed, help=f"of the draws (default {default.seed})")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and generate."""
    options = parser().parse_args(arguments)
    if options.max_new_tokens < 1:
        raise UserError("must be at least 1", where="--max-new-tokens")
    if not (0 <= options.temperature < math.inf and 0 < options.top_p <= 1):
        raise UserError("temperature must be 0 or more and top-p in (0, 1]", where="--temperature, --top-p")
    if 0 < options.temperature < COLDEST:
        raise UserError(
            f"{options.temperature} is too small to divide by",
            where="--temperature",
            fix=f"give {COLDEST} or 0, greedy",
        )
    for prompt in options.prompt:
        _check_text(prompt)
    if not 0 <= options.seed < 1 << 63:
        raise UserError("must be 0 or more and fit 63 bits", where="--seed")
    with leaving_at_once():  # torch and transformers: seconds
        from minicpm_megatron.convert.generation import Generator

    generator = Generator(find_source(options.checkpoint), options.tokenizer)
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed)
    for prompt in options.prompt:
        full: list[int] = []
        print(generator.continue_text(prompt, sampling, full.append), flush=True)
        for new in full:
            print(
                f"note: the context of {generator.longest:,} tokens is full after {new:,} new ones",
                file=sys.stderr,
                flush=True,
            )


def _check_text(prompt: str) -> None:
    """Refuse bytes of the command line that are not UTF-8, which Python hands on as lone surrogates."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"character {error.start + 1} is not UTF-8 text", where="--prompt") from None
