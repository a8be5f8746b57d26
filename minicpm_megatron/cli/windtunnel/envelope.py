"""`minicpm windtunnel envelope`."""

from __future__ import annotations

import argparse

from minicpm_megatron.cli.windtunnel.options import (
    Subparsers,
    add_decay_options,
    add_queue_options,
    parse_list,
    parse_sizes,
    run_queue,
)
from minicpm_megatron.recipe import Recipe
from minicpm_megatron.windtunnel.envelope.runs import (
    LARGE_TOKENS_PER_PARAMETER,
    POINTS,
    TOKENS_PER_PARAMETER,
    EnvelopeSettings,
    plan_envelope,
)
from minicpm_megatron.windtunnel.experiment import Experiment


def add(commands: Subparsers) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "envelope",
        description="Decays from one stable run of a small model at ever more tokens; a power law and an exponential"
        " through their losses over compute; and with a second, larger size what the small one must be trained on to"
        " reach its loss, and after how many served tokens that has paid. The recipe's schedule gives unit and warmup.",
    )
    add_queue_options(command)
    command.add_argument(
        "--sizes", required=True, metavar="SMALL[,LARGE]", help="WIDTHxLAYERS of one or two models, as 64x4,128x6"
    )
    add_decay_options(command, POINTS, TOKENS_PER_PARAMETER)
    command.add_argument(
        "--large-tokens-per-parameter",
        default=f"{LARGE_TOKENS_PER_PARAMETER:g}",
        metavar="X,...",
        help="of the ends of the large model's decays (default: %(default)s)",
    )
    command.add_argument("--seeds", default="1", help="seeds of each run (default: %(default)s)")

    def plan(options: argparse.Namespace, base: Recipe) -> Experiment:
        per = "--large-tokens-per-parameter"
        settings = EnvelopeSettings(
            sizes=parse_sizes(options.sizes, "--sizes"),
            points=options.points,
            tokens_per_parameter=parse_list(options.tokens_per_parameter, float, "--tokens-per-parameter"),
            large_tokens_per_parameter=parse_list(options.large_tokens_per_parameter, float, per),
            decay_share=options.decay_share,
            shape=options.shape,
            seeds=parse_list(options.seeds, int, "--seeds"),
        )
        return plan_envelope(base, settings, options.output)

    command.set_defaults(run=run_queue, plan=plan)
