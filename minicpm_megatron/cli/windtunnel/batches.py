"""`minicpm windtunnel batch-size`."""

from __future__ import annotations

import argparse

from minicpm_megatron.cli.windtunnel.options import Subparsers, add_queue_options, parse_list, parse_sizes, run_queue
from minicpm_megatron.recipe import Recipe
from minicpm_megatron.windtunnel.batches.findings import Reading
from minicpm_megatron.windtunnel.batches.runs import BatchSettings, plan_batches
from minicpm_megatron.windtunnel.cells import held_out_samples
from minicpm_megatron.windtunnel.experiment import Experiment


def add(commands: Subparsers) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "batch-size",
        description="Every size at every batch size on the same tokens, at a constant learning rate after the recipe's"
        " warmup or under the paper's cosine; the tokens that each batch size needs for a loss, the parabolas through"
        " them, and bs = a / L^b through their minima. --losses, --contours and --predict only read the runs: with"
        " others, finished runs are not run again.",
    )
    add_queue_options(command)
    command.add_argument(
        "--sizes", required=True, metavar="WIDTHxLAYERS,...", help="models, for instance 64x4,128x6,256x8"
    )
    command.add_argument(
        "--batches", required=True, metavar="TOKENS,...", help="batch sizes in tokens, four or more, best octaves"
    )
    command.add_argument("--tokens", required=True, type=float, metavar="D", help="of each run")
    command.add_argument(
        "--schedule",
        choices=("constant", "cosine"),
        default="constant",
        help="after the warmup; the paper's is cosine, over the whole run (default: %(default)s)",
    )
    command.add_argument("--seeds", default="1", help="seeds of each run (default: %(default)s)")
    command.add_argument(
        "--evaluations", type=int, default=40, help="of each run at most, evenly spaced (default: %(default)s)"
    )
    command.add_argument(
        "--losses", metavar="L,...", help="of the contours (default: --contours over what was reached)"
    )
    command.add_argument("--contours", type=int, default=8, help="losses at which contours are drawn (default: 8)")
    command.add_argument("--predict", metavar="L,...", help="expected losses to give the batch size for")

    def plan(options: argparse.Namespace, base: Recipe) -> Experiment:
        settings = BatchSettings(
            sizes=parse_sizes(options.sizes, "--sizes"),
            batches=parse_list(options.batches, int, "--batches"),
            seeds=parse_list(options.seeds, int, "--seeds"),
            tokens=options.tokens,
            evaluations=options.evaluations,
            schedule=options.schedule,
        )
        reading = Reading(
            losses=parse_list(options.losses, float, "--losses") if options.losses else (),
            contours=options.contours,
            predict=parse_list(options.predict, float, "--predict") if options.predict else (),
        )
        return plan_batches(base, settings, reading, options.output, held_out_samples(base))

    command.set_defaults(run=run_queue, plan=plan)
