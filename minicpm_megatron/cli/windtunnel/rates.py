"""`minicpm windtunnel lr`."""

from __future__ import annotations

import argparse

from minicpm_megatron.cli.windtunnel.options import Subparsers, add_queue_options, parse_list, parse_sizes, run_queue
from minicpm_megatron.recipe import Recipe
from minicpm_megatron.windtunnel.experiment import Experiment
from minicpm_megatron.windtunnel.rates.sweep import (
    PARAMETRIZATIONS,
    STANDARD_DIVISOR,
    Parametrization,
    RateSettings,
    plan_rates,
)


def add(commands: Subparsers) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "lr",
        description="Held-out loss over the base rate, for each size, in muP and in standard parametrisation.",
    )
    add_queue_options(command)
    command.add_argument(
        "--sizes", required=True, metavar="WIDTHxLAYERS,...", help="models, for instance 64x4,128x6,256x8"
    )
    command.add_argument(
        "--rates",
        default="0.00125,0.0025,0.005,0.01,0.02,0.04,0.08",
        help="base rates under muP (default: %(default)s)",
    )
    command.add_argument(
        "--standard-rates", help=f"rates in standard parametrisation (default: --rates over {STANDARD_DIVISOR:g})"
    )
    command.add_argument(
        "--parametrizations",
        default=",".join(PARAMETRIZATIONS),
        help="mup, standard or both (default: %(default)s)",
    )
    command.add_argument("--seeds", default="1", help="seeds of each run (default: %(default)s)")
    command.add_argument(
        "--tokens-per-parameter",
        type=float,
        metavar="X",
        help="train each size on X tokens a parameter, the recipe's schedule stretched (default: as the recipe says)",
    )

    def plan(options: argparse.Namespace, base: Recipe) -> Experiment:
        rates = parse_list(options.rates, float, "--rates")
        standard = (
            tuple(rate / STANDARD_DIVISOR for rate in rates)
            if options.standard_rates is None
            else parse_list(options.standard_rates, float, "--standard-rates")
        )
        settings = RateSettings(
            sizes=parse_sizes(options.sizes, "--sizes"),
            rates=rates,
            standard_rates=standard,
            parametrizations=parse_list(options.parametrizations, _parametrization, "--parametrizations"),
            seeds=parse_list(options.seeds, int, "--seeds"),
            tokens_per_parameter=options.tokens_per_parameter,
        )
        return plan_rates(base, settings, options.output)

    command.set_defaults(run=run_queue, plan=plan)


def _parametrization(text: str) -> Parametrization:
    found: list[Parametrization] = [name for name in PARAMETRIZATIONS if name == text]
    if not found:
        raise ValueError(text)
    return found[0]
