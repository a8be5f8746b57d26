"""`minicpm windtunnel decay-study`."""

from __future__ import annotations

import argparse

from minicpm_megatron.cli.windtunnel.options import Subparsers, add_queue_options, parse_list, run_queue
from minicpm_megatron.recipe import Recipe
from minicpm_megatron.windtunnel.decay_stage.study import CHECKPOINTS, DECAY_SHARE, StudySettings, plan_study
from minicpm_megatron.windtunnel.experiment import Experiment


def add(commands: Subparsers) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "decay-study",
        description="Gradient norm, cosine of consecutive gradients, derivatives and curvature along the update in"
        " every step, and the largest element update of every matrix between checkpoints: before a decay, in it, and in"
        " the same steps of a run that does not decay. The recipe's own schedule gives length, warmup and unit.",
    )
    add_queue_options(command)
    command.add_argument(
        "--decay-share", type=float, default=DECAY_SHARE, help="of the steps, that is decay (default: %(default)s)"
    )
    command.add_argument("--shape", default="exponential", help="of the decay (default: %(default)s)")
    command.add_argument(
        "--checkpoints",
        type=int,
        default=CHECKPOINTS,
        help="kept in the decay, in as many steps before it, and without it (default: %(default)s)",
    )
    command.add_argument(
        "--interval", type=int, default=1, help="steps between measurements of gradients (default: %(default)s)"
    )
    command.add_argument("--seeds", default="1", help="of which each is a trunk and a decay (default: %(default)s)")

    def plan(options: argparse.Namespace, base: Recipe) -> Experiment:
        settings = StudySettings(
            decay_share=options.decay_share,
            shape=options.shape,
            checkpoints=options.checkpoints,
            interval=options.interval,
            seeds=parse_list(options.seeds, int, "--seeds"),
        )
        return plan_study(base, settings, options.output)

    command.set_defaults(run=run_queue, plan=plan)
