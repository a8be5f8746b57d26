"""`minicpm windtunnel scaling-law`."""

from __future__ import annotations

import argparse

from minicpm_megatron.cli.windtunnel.options import (
    Subparsers,
    add_decay_options,
    add_law_options,
    add_queue_options,
    parse_compute,
    parse_list,
    parse_sizes,
    run_queue,
)
from minicpm_megatron.recipe import Recipe
from minicpm_megatron.windtunnel.cells import check_loss_per_byte
from minicpm_megatron.windtunnel.experiment import Experiment
from minicpm_megatron.windtunnel.law.runs import (
    POINTS,
    TOKENS_PER_PARAMETER,
    ScalingSettings,
    plan_scaling,
)


def add(commands: Subparsers) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "scaling-law",
        description="Decays at several amounts of tokens from one stable run of every size; then what `fit` does, with"
        " the losses per byte of every held-out set. The recipe's schedule gives unit and warmup.",
    )
    add_queue_options(command)
    command.add_argument(
        "--sizes", required=True, metavar="WIDTHxLAYERS,...", help="three models or more, for instance 64x4,128x6,256x8"
    )
    add_decay_options(command, POINTS, TOKENS_PER_PARAMETER)
    add_law_options(command)

    def plan(options: argparse.Namespace, base: Recipe) -> Experiment:
        settings = ScalingSettings(
            sizes=parse_sizes(options.sizes, "--sizes"),
            points=options.points,
            tokens_per_parameter=parse_list(options.tokens_per_parameter, float, "--tokens-per-parameter"),
            decay_share=options.decay_share,
            shape=options.shape,
            method=options.method,
            compute=parse_compute(options.compute),
        )
        check_loss_per_byte(base)
        return plan_scaling(base, settings, options.output)

    command.set_defaults(run=run_queue, plan=plan)
