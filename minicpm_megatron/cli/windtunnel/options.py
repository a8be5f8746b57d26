"""Options and values that several subcommands take."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from minicpm_megatron.cli.interrupts import leaving_at_once
from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.economics import DECAY_SHARE
from minicpm_megatron.methods.scaling_law import PUBLISHED_COMPUTE
from minicpm_megatron.recipe import Recipe, load_recipe
from minicpm_megatron.recipe.sizes import parse_size
from minicpm_megatron.windtunnel.experiment import Ended, Experiment, format_plan, run_experiment
from minicpm_megatron.windtunnel.launch import Launcher
from minicpm_megatron.windtunnel.law.fits import METHODS
from minicpm_megatron.windtunnel.queue import Outcome, Queue

T = TypeVar("T")
Plan = Callable[[argparse.Namespace, Recipe], Experiment]
Run = Callable[[argparse.Namespace, Path], Ended]
type Subparsers = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_recipe_options(command: argparse.ArgumentParser) -> None:
    """Recipe, overrides, output and --dry-run, which every experiment takes."""
    command.add_argument("--recipe", required=True, metavar="FILE", help="YAML recipe that all runs are made of")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="change one value of the recipe")
    command.add_argument("--output", type=Path, required=True, help="folder of the experiment; made if need be")
    command.add_argument("--dry-run", action="store_true", help="print the runs and what they cost, and exit")


def add_queue_options(command: argparse.ArgumentParser) -> None:
    """Those of add_recipe_options and of add_launch_options."""
    add_recipe_options(command)
    add_launch_options(command)


def add_launch_options(command: argparse.ArgumentParser) -> None:
    """How runs are started and shared out."""
    command.add_argument("--workers", type=int, default=1, help="runs at once on this machine (default: 1)")
    command.add_argument(
        "--launcher",
        default="",
        metavar="COMMAND",
        help="what starts examples/train.py, for instance 'deepspeed --num_gpus 8' (default: this Python, one process)",
    )
    command.add_argument(
        "--devices",
        default="",
        metavar="N,...",
        help="CUDA devices to share out between the workers (default: all)",
    )
    command.add_argument(
        "--flops-per-second", type=float, metavar="F", help="rate of one worker, for the times of --dry-run"
    )


def planned(options: argparse.Namespace) -> Experiment:
    """The experiment that was asked for.

    Raises:
        UserError: the recipe or an option is wrong.
    """
    experiment: Experiment = options.plan(options, load_recipe(options.recipe, options.overrides))
    return experiment


def run_queue(options: argparse.Namespace, script: Path) -> Ended:
    """Plan the experiment, and print the plan or have the trainer run its cells."""
    launcher = Launcher.of(script, options.launcher, options.workers, options.devices)
    rate = options.flops_per_second
    if rate is not None and not rate > 0:
        raise UserError(f"{rate} is no rate", where="--flops-per-second", fix="give FLOP/s, for instance 2e14")
    experiment = planned(options)
    if options.dry_run:
        print(format_plan(experiment, rate, launcher.workers))
        return "done"
    import_torch()

    def run() -> Outcome:
        return Queue(experiment.every_cell(), launcher, say, experiment.source).run()

    return run_experiment(experiment, run, say, workers=launcher.workers)


def import_torch() -> None:
    """Import torch, which takes seconds, at a time when Ctrl-C is one line."""
    with leaving_at_once():
        import torch  # noqa: F401


def say(line: str) -> None:
    """Print a line at once, also where the output is a file."""
    print(line, flush=True)


def parse_list[T](text: str, convert: Callable[[str], T], where: str) -> tuple[T, ...]:
    """Values that commas separate; UserError at `where` where one cannot be read."""
    try:
        return tuple(convert(part.strip()) for part in text.split(","))
    except ValueError:
        raise UserError(f"{text!r} is not a list that can be read", where=where, fix="separate by commas") from None


def parse_sizes(text: str, where: str) -> tuple[tuple[int, int], ...]:
    """(width, layers) of each of WIDTHxLAYERS,...; UserError at `where` where one is of another form."""
    return tuple(parse_size(part.strip(), where) for part in text.split(","))


def add_decay_options(command: argparse.ArgumentParser, points: int, tokens_per_parameter: tuple[float, float]) -> None:
    """--points, --tokens-per-parameter, --decay-share and --shape of decays that leave one trunk a size."""
    command.add_argument("--points", type=int, default=points, help="decays of each trunk (default: %(default)s)")
    command.add_argument(
        "--tokens-per-parameter",
        default=",".join(f"{each:g}" for each in tokens_per_parameter),
        metavar="LOW,HIGH",
        help="of the first and the last decay's end (default: %(default)s)",
    )
    command.add_argument(
        "--decay-share", type=float, default=DECAY_SHARE, help="of the tokens, that is decay (default: %(default)s)"
    )
    command.add_argument("--shape", default="exponential", help="of the decays (default: %(default)s)")


def add_law_options(command: argparse.ArgumentParser) -> None:
    """--method and --compute of a fitted law."""
    command.add_argument(
        "--method",
        choices=METHODS,
        default=METHODS[0],
        help="the fit that findings and pictures speak of; tables have both (default: %(default)s)",
    )
    command.add_argument(
        "--compute",
        type=float,
        default=PUBLISHED_COMPUTE,
        metavar="FLOPS",
        help="of the compute-optimal model (default: %(default)g, the paper's)",
    )


def parse_compute(value: float) -> float:
    """FLOPs above 0; UserError otherwise."""
    if not 0 < value < math.inf:
        raise UserError(f"{value} FLOPs are no compute", where="--compute", fix="give a number, for instance 1e21")
    return value
