"""Convert a model between our checkpoints, Megatron's and published formats; the input's format is recognised.

    minicpm convert --input runs/quickstart --to llama --output runs/quickstart/hf-llama
    minicpm convert --input runs/quickstart --to torch_dist --output megatron/quickstart
    minicpm convert --input megatron/2b --preset minicpm-2.4b --to granite --output hf-granite
    minicpm convert --input quickstart@300 --untie --to megatron --output runs/untied

With --untie a model whose LM head is its embedding becomes one whose head has weights of its own, at first equal to the
embedding. To megatron that makes a run, with step, data position, schedule and optimizer state carried over.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from minicpm_megatron.checkpoint.find import find_source
from minicpm_megatron.cli.arguments import Parser
from minicpm_megatron.cli.interrupts import leaving_at_once
from minicpm_megatron.convert.target_names import MEGATRON, targets
from minicpm_megatron.convert.weight_options import DEFAULT_DTYPE, DEFAULT_SHARD, DTYPE_NAMES
from minicpm_megatron.derive.moments import HEAD_MOMENTS
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import ModelRecipe, count_parameters, get_preset, load_recipe


def parser() -> Parser:
    """Return the parser; `--help` is its documentation."""
    result = Parser(description=__doc__)
    result.add_argument(
        "--input",
        required=True,
        help="run (its newest checkpoint), RUN@STEP, checkpoint, Hugging Face model folder, or torch_dist checkpoint:"
        " Megatron-LM's folder (its newest) or one iteration in it",
    )
    result.add_argument("--output", type=Path, required=True, help="folder to make; appears whole or not at all")
    result.add_argument("--to", required=True, choices=targets(), help="format to write; megatron is our checkpoint")
    result.add_argument("--preset", help="the model of a torch_dist checkpoint that does not contain it")
    result.add_argument("--recipe", type=Path, help="the same, as the model of a recipe")
    result.add_argument(
        "--dtype",
        choices=tuple(DTYPE_NAMES),
        help=f"type of the weights (default: {DEFAULT_DTYPE} in published formats, fp32 in torch_dist)",
    )
    result.add_argument("--max-shard-size", default=DEFAULT_SHARD, help=f"for example 500MB (default {DEFAULT_SHARD})")
    result.add_argument("--tokenizer", type=Path, help="tokenizer folder (default: the one the input has or records)")
    result.add_argument(
        "--rope-fixed",
        type=int,
        metavar="LENGTH",
        help="write dynamic RoPE as the one base of sequences of LENGTH tokens, for programs that have no dynamic one",
    )
    result.add_argument("--overwrite", action="store_true", help="replace a model that is already at --output")
    result.add_argument(
        "--untie",
        action="store_true",
        help="give a tied model a head of its own, a copy of its embedding; with --to megatron --output is a run to go"
        " on with",
    )
    result.add_argument(
        "--head-moments",
        choices=HEAD_MOMENTS,
        help=f"what the untied head gets of Adam's moments: the embedding's, or zeros (default {HEAD_MOMENTS[0]})",
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and convert."""
    options = parser().parse_args(arguments)
    to_run = options.untie and options.to == MEGATRON
    if options.head_moments and not to_run:
        raise UserError("no optimizer state is written", where="--head-moments", fix="needs --untie --to megatron")
    if to_run:
        return _untie(options)
    with leaving_at_once():  # torch: seconds
        from minicpm_megatron.convert.operation import convert
    done = convert(
        find_source(options.input),
        options.output,
        options.to,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        tokenizer=options.tokenizer,
        overwrite=options.overwrite,
        untie=options.untie,
        rope_fixed=options.rope_fixed,
        model=_model(options),
        progress=sys.stderr.isatty(),
    )
    _print_notes(done.notes)
    print(f"{done.source_format} -> {done.target_format}: {done.parameters:,} parameters in {done.output}")
    return 0


def _model(options: argparse.Namespace) -> ModelRecipe | None:
    if options.preset and options.recipe:
        raise UserError("--preset says it already", where="--recipe", fix="give one of them")
    if options.recipe:
        return load_recipe(options.recipe).model
    return get_preset(options.preset) if options.preset else None


def _print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _untie(options: argparse.Namespace) -> int:
    for given, where, what in (
        (options.dtype, "--dtype", "checkpoints always hold fp32"),
        (options.tokenizer, "--tokenizer", "the untied run keeps the tokenizer of its model"),
        (options.rope_fixed, "--rope-fixed", "the untied run keeps the RoPE of its model"),
        (options.overwrite, "--overwrite", "--untie --to megatron makes a run, and no run is replaced"),
    ):
        if given:
            raise UserError(what, where=where, fix="leave it out")
    with leaving_at_once():  # torch: seconds
        from minicpm_megatron.derive.untie import untie
    done = untie(
        find_source(options.input),
        options.output,
        head_moments=options.head_moments,
        model=_model(options),
        progress=sys.stderr.isatty(),
    )
    _print_notes(done.notes)
    parameters = count_parameters(done.model).total
    print(f"{options.input} -> {done.run}, step {done.step}: a head of its own; {parameters:,} parameters")
    print(done.how_to_go_on())
    return 0
