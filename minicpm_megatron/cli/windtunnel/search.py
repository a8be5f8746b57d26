"""`minicpm windtunnel search`."""

from __future__ import annotations

import argparse

from minicpm_megatron.cli.windtunnel.options import Subparsers, add_queue_options, parse_list, run_queue
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import Recipe
from minicpm_megatron.recipe.sizes import parse_size
from minicpm_megatron.windtunnel.experiment import Experiment
from minicpm_megatron.windtunnel.search.search import REPEATS, TRIALS, SearchSettings, plan_search
from minicpm_megatron.windtunnel.search.space import AXES, Range


def add(commands: Subparsers) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "search",
        description="Bayesian search over the constants of muP and the base rate, the paper's set first: the loss of"
        " every trial, the best set beside the paper's with limits from further seeds, and the importance of each"
        " value. The paper's model is the preset windtunnel-9m with --tokens-per-parameter 10.",
    )
    add_queue_options(command)
    command.add_argument(
        "--trials", type=int, default=TRIALS, help="sets to try, the paper's included (default: %(default)s)"
    )
    command.add_argument(
        "--repeats",
        type=int,
        default=REPEATS,
        help="further seeds of the paper's set and of the best of the others (default: %(default)s; 2 or more for"
        " limits)",
    )
    for axis in AXES:
        low, high = axis.default_range()
        command.add_argument(
            axis.option,
            default=f"{low:g},{high:g}",
            metavar="LOW,HIGH",
            help=f"range of {axis.key}, on a logarithm (default: %(default)s; the paper's best is {axis.paper:g})",
        )
    command.add_argument("--seed", type=int, default=1, help="of the search (default: %(default)s)")
    command.add_argument("--size", metavar="WIDTHxLAYERS", help="of the model (default: the recipe's)")
    command.add_argument(
        "--tokens-per-parameter",
        type=float,
        metavar="X",
        help="train on X tokens a parameter, the recipe's schedule stretched (default: as the recipe says)",
    )

    command.set_defaults(run=run_queue, plan=_plan)


def _plan(options: argparse.Namespace, base: Recipe) -> Experiment:
    settings = SearchSettings(
        ranges={axis.name: _range(getattr(options, axis.name), axis.option) for axis in AXES},
        trials=options.trials,
        repeats=options.repeats,
        seed=options.seed,
        size=None if options.size is None else parse_size(options.size, "--size"),
        tokens_per_parameter=options.tokens_per_parameter,
    )
    return plan_search(base, settings, options.output)


def _range(text: str, option: str) -> Range:
    ends = parse_list(text, float, option)
    if len(ends) != 2:
        raise UserError(f"{text!r} is no range", where=option, fix="give LOW,HIGH")
    return ends[0], ends[1]
