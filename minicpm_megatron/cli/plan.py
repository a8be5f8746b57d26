"""Find the layout to train with before a GPU is rented: memory, communication and step time by formula.

    minicpm plan --recipe examples/recipes/minicpm-2.4b.yaml --gpu h100 --gpus 64
    minicpm plan --preset minicpm-1.2b --sequence-length 4096 --global-batch-size 480 --gpu a100-80 --gpus 8

Predictions, not measurements (docs/plan.md).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from minicpm_megatron.cli.arguments import Parser
from minicpm_megatron.errors import UserError
from minicpm_megatron.planning import GPUS, Cluster, find_layouts
from minicpm_megatron.planning.report import GIB, format_plan, plan_values
from minicpm_megatron.planning.search import RECOMPUTE, ZERO_STAGES
from minicpm_megatron.recipe import Recipe, build, load_recipe


def parser() -> Parser:
    """Return the parser; `--help` is its documentation."""
    result = Parser(description=__doc__)
    source = result.add_mutually_exclusive_group(required=True)
    source.add_argument("--recipe", type=Path, help="recipe file; its layout, micro-batch and ZeRO stage are replaced")
    source.add_argument("--preset", help="a model by name; needs the next two")
    result.add_argument("--sequence-length", type=int, help="tokens a sample (default: the recipe's)")
    result.add_argument("--global-batch-size", type=int, help="samples a step (default: the recipe's)")
    result.add_argument("--gpu", required=True, help=", ".join(GPUS))
    result.add_argument("--gpus", type=int, required=True, help="GPUs in all")
    result.add_argument("--gpus-per-node", type=int, default=8, help="GPUs that NVLink joins (default 8)")
    result.add_argument("--recompute", choices=("none", "selective", "full"), help="default: the faster that fits")
    result.add_argument("--zero-stage", type=int, choices=range(4), help="default: the fastest of 1 to 3 that fits")
    result.add_argument("--top", type=int, default=5, help="layouts to print (default 5)")
    result.add_argument("--json", action="store_true", help="print JSON: bytes, seconds, fractions")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, search and print."""
    options = parser().parse_args(arguments)
    if options.top < 1:
        raise UserError("must be at least 1", where="--top")
    cluster = Cluster.of(options.gpu, options.gpus, options.gpus_per_node)
    recipe = _recipe(options)
    plan = find_layouts(
        recipe,
        cluster,
        recompute=RECOMPUTE if options.recompute is None else (options.recompute,),
        zero_stages=ZERO_STAGES if options.zero_stage is None else (options.zero_stage,),
    )
    if options.json:
        print(json.dumps(plan_values(plan, options.top), indent=1))
        return
    batch, length = recipe.training.global_batch_size, recipe.data.sequence_length
    title = (
        f"{recipe.preset or recipe.name}: {batch:,} samples of {length:,} tokens on {cluster.gpus} {options.gpu},"
        f" {min(cluster.gpus, cluster.gpus_per_node)} a node, {cluster.usable_memory / GIB:.1f} GiB usable of each"
    )
    print(format_plan(plan, title, options.top))


def _recipe(options: argparse.Namespace) -> Recipe:
    given = {"data.sequence_length": options.sequence_length, "training.global_batch_size": options.global_batch_size}
    if options.recipe is not None:
        chosen = [f"{key}={value}" for key, value in given.items() if value is not None]
        return load_recipe(options.recipe, [*chosen, "training.micro_batch_size=1"])
    for option, value in (
        ("--sequence-length", options.sequence_length),
        ("--global-batch-size", options.global_batch_size),
    ):
        if value is None:
            raise UserError("missing, and --preset has none", where=option, fix="give it, or a --recipe")
    return build(
        {
            "name": "plan",
            "preset": options.preset,
            "data": {"train": [{"prefix": "unread"}], "sequence_length": options.sequence_length},
            "training": {"global_batch_size": options.global_batch_size, "micro_batch_size": 1},
            "schedule": {"shape": "constant", "total": 1},
        }
    )
