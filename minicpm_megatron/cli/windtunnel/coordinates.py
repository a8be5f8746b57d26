"""`minicpm windtunnel coord-check`."""

from __future__ import annotations

import argparse
from pathlib import Path

from minicpm_megatron.cli.windtunnel.options import (
    Subparsers,
    add_recipe_options,
    import_torch,
    parse_list,
    planned,
    say,
)
from minicpm_megatron.recipe import Recipe
from minicpm_megatron.windtunnel.coordinates.check import CoordinateSettings, plan_coordinates, run_coordinates
from minicpm_megatron.windtunnel.experiment import Ended, Experiment, format_plan, run_experiment


def add(commands: Subparsers) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "coord-check",
        description="Sizes of activations, of their changes and of logits after a few steps over widths and depths, in"
        " muP and in standard parametrisation, on the recipe's own tokens, rate and batch.",
    )
    add_recipe_options(command)
    command.add_argument("--widths", default="128,256,512", help="of models of --layers (default: %(default)s)")
    command.add_argument("--layers", type=int, default=3, help="of the models of --widths (default: %(default)s)")
    command.add_argument("--depths", default="2,4,8,16", help="layers of models of --width (default: %(default)s)")
    command.add_argument("--width", type=int, default=128, help="of the models of --depths (default: %(default)s)")
    command.add_argument("--steps", type=int, default=10, help="of training (default: %(default)s)")
    command.add_argument("--seeds", default="1", help="seeds of each model (default: %(default)s)")

    def plan(options: argparse.Namespace, base: Recipe) -> Experiment:
        settings = CoordinateSettings(
            widths=parse_list(options.widths, int, "--widths") if options.widths else (),
            layers=options.layers,
            depths=parse_list(options.depths, int, "--depths") if options.depths else (),
            width=options.width,
            steps=options.steps,
            seeds=parse_list(options.seeds, int, "--seeds"),
        )
        return plan_coordinates(base, settings, options.output)

    command.set_defaults(run=_run, plan=plan)


def _run(options: argparse.Namespace, script: Path) -> Ended:
    experiment = planned(options)
    if options.dry_run:
        print(format_plan(experiment))
        return "done"
    import_torch()
    return run_experiment(experiment, lambda: run_coordinates(experiment, say), say)
