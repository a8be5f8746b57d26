"""`minicpm windtunnel wsd`."""

from __future__ import annotations

import argparse

from minicpm_megatron.cli.windtunnel.options import Subparsers, add_queue_options, parse_list, run_queue
from minicpm_megatron.recipe import Recipe
from minicpm_megatron.windtunnel.decays.comparison import SHARES, DecaySettings, plan_decays
from minicpm_megatron.windtunnel.experiment import Experiment


def add(commands: Subparsers) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "wsd",
        description="WSD with decays of every share and shape, branched from one trunk, against Cosine(T) for T below,"
        " at and above the length S of the recipe's schedule, and CosineLoop(T). The recipe's own schedule gives S,"
        " warmup and unit.",
    )
    add_queue_options(command)
    command.add_argument("--ends", default="0.5,1", help="lengths to compare at, as shares of S (default: %(default)s)")
    command.add_argument(
        "--shares",
        default=",".join(map(str, SHARES)),
        help="shares of a length that are decay (default: %(default)s)",
    )
    command.add_argument(
        "--shapes",
        default="exponential,linear,cosine,1-sqrt",
        help="decay shapes; the findings speak of the first (default: %(default)s)",
    )
    command.add_argument(
        "--periods", default="0.5,1,1.5", help="T of the cosines as shares of S, besides --ends (default: %(default)s)"
    )
    command.add_argument("--seeds", default="1,2", help="seeds of each run (default: %(default)s)")

    def plan(options: argparse.Namespace, base: Recipe) -> Experiment:
        settings = DecaySettings(
            ends=parse_list(options.ends, float, "--ends"),
            shares=parse_list(options.shares, float, "--shares"),
            shapes=parse_list(options.shapes, str, "--shapes"),
            periods=parse_list(options.periods, float, "--periods"),
            seeds=parse_list(options.seeds, int, "--seeds"),
        )
        return plan_decays(base, settings, options.output)

    command.set_defaults(run=run_queue, plan=plan)
