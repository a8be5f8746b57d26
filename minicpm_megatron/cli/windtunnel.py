"""The command line of tools/windtunnel.py: one subcommand an experiment."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from minicpm_megatron.cli.train import only_our_lines
from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.scaling_law import PUBLISHED_COMPUTE
from minicpm_megatron.recipe import Recipe, load_recipe
from minicpm_megatron.storage.atomic import write_bytes
from minicpm_megatron.windtunnel.coordinates import CoordinateSettings, plan_coordinates, run_coordinates
from minicpm_megatron.windtunnel.decays import SHARES, DecaySettings, plan_decays
from minicpm_megatron.windtunnel.experiment import Experiment, format_plan, run_experiment
from minicpm_megatron.windtunnel.fit import fit_csv
from minicpm_megatron.windtunnel.launch import Launcher
from minicpm_megatron.windtunnel.law_fits import METHODS
from minicpm_megatron.windtunnel.law_runs import (
    DECAY_SHARE,
    POINTS,
    TOKENS_PER_PARAMETER,
    ScalingSettings,
    plan_scaling,
)
from minicpm_megatron.windtunnel.queue import Queue
from minicpm_megatron.windtunnel.rates import (
    PARAMETRIZATIONS,
    STANDARD_DIVISOR,
    Parametrization,
    RateSettings,
    plan_rates,
)
from minicpm_megatron.windtunnel.results import format_markdown, format_results, read_results

DESCRIPTION = """The paper's experiments (arXiv 2404.06395, sections 3 and 4) on models as small as your machine wants.

  python tools/windtunnel.py lr --recipe R.yaml --sizes 64x4,128x6 --output runs/lr --dry-run
  python tools/windtunnel.py lr --recipe R.yaml --sizes 64x4,128x6 --output runs/lr --workers 2
  python tools/windtunnel.py scaling-law --recipe R.yaml --sizes 64x4,128x6,256x8 --output runs/law
  python tools/windtunnel.py fit --csv losses.csv
  python tools/windtunnel.py report --runs runs/lr runs/wsd --output runs/report.md

Every experiment is made of runs of examples/train.py with your recipe and overrides. Killed or stopped, the same
command goes on where it was; started several times on a shared folder, on one machine or many, the runs are divided
between the starts. docs/windtunnel.md says what each measures and where it stands in the paper."""

T = TypeVar("T")
Plan = Callable[[argparse.Namespace, Recipe], Experiment]


def parser() -> argparse.ArgumentParser:
    """The parser; `--help` of each subcommand is its documentation."""
    raw = argparse.RawDescriptionHelpFormatter
    result = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=raw)
    commands = result.add_subparsers(dest="command", required=True, metavar="SUBCOMMAND")
    _add_rates(commands)
    _add_decays(commands)
    _add_coordinates(commands)
    _add_scaling(commands)
    _add_fit(commands)
    _add_report(commands)
    return result


def main(script: Path, arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status.

    Args:
        script: examples/train.py, which trains the cells.

    Raises:
        UserError: the input is wrong.
    """
    command = parser()
    options, left = command.parse_known_args(arguments)
    # overrides that stand apart; argparse itself takes only those that stand together
    if left and ("overrides" not in options or any(word.startswith("-") for word in left)):
        command.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        options.overrides += left
    run: Callable[[argparse.Namespace, Path], int] = options.run
    return run(options, script)


def _add_rates(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "lr",
        help="does the best learning rate move with the size? (section 3.3)",
        description="Held-out loss over the base rate, for each size, in muP and in standard parametrisation.",
    )
    _add_common(command)
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
        rates = _list(options.rates, float, "--rates")
        standard = (
            tuple(rate / STANDARD_DIVISOR for rate in rates)
            if options.standard_rates is None
            else _list(options.standard_rates, float, "--standard-rates")
        )
        settings = RateSettings(
            sizes=_list(options.sizes, _size, "--sizes"),
            rates=rates,
            standard_rates=standard,
            parametrizations=_list(options.parametrizations, _parametrization, "--parametrizations"),
            seeds=_list(options.seeds, int, "--seeds"),
            tokens_per_parameter=options.tokens_per_parameter,
        )
        return plan_rates(base, settings, options.output)

    command.set_defaults(run=lambda options, script: _run(options, script, plan))


def _add_decays(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "wsd",
        help="how long a decay must be, and whether WSD matches Cosine (sections 4.1 to 4.3)",
        description="WSD with decays of every share and shape, branched from one trunk, against Cosine(T) for T below,"
        " at and above the length S of the recipe's schedule, and CosineLoop(T). The recipe's own schedule gives S,"
        " warmup and unit.",
    )
    _add_common(command)
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
            ends=_list(options.ends, float, "--ends"),
            shares=_list(options.shares, float, "--shares"),
            shapes=_list(options.shapes, str, "--shapes"),
            periods=_list(options.periods, float, "--periods"),
            seeds=_list(options.seeds, int, "--seeds"),
        )
        return plan_decays(base, settings, options.output)

    command.set_defaults(run=lambda options, script: _run(options, script, plan))


def _add_fit(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "fit",
        help="the scaling law of losses that you have (section 4.5)",
        description="Fit L(N, D) = C_N N^-alpha + C_D D^-beta + L0 to losses of any origin, one held-out set after the"
        " other and their mean, with 95 %% limits by bootstrap, beside the paper's average.",
    )
    command.add_argument(
        "--csv",
        type=Path,
        required=True,
        metavar="FILE",
        help="a line a checkpoint: n (parameters without embeddings), d (tokens), loss, and set where there are several"
        " held-out sets; absolute numbers, not billions",
    )
    _add_law(command)
    command.add_argument("--output", type=Path, help="folder for results.json and pictures (default: print only)")
    command.set_defaults(run=_fit)


def _add_scaling(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "scaling-law",
        help="the scaling law from one stable run a size (section 4.5)",
        description="Decays at several amounts of tokens from one stable run of every size; then what `fit` does, with"
        " the losses per byte of every held-out set. The recipe's schedule gives unit and warmup.",
    )
    _add_common(command)
    command.add_argument(
        "--sizes", required=True, metavar="WIDTHxLAYERS,...", help="three models or more, for instance 64x4,128x6,256x8"
    )
    command.add_argument("--points", type=int, default=POINTS, help="decays of each size (default: %(default)s)")
    command.add_argument(
        "--tokens-per-parameter",
        default=",".join(f"{each:g}" for each in TOKENS_PER_PARAMETER),
        metavar="LOW,HIGH",
        help="of the first and the last decay's end (default: %(default)s)",
    )
    command.add_argument(
        "--decay-share", type=float, default=DECAY_SHARE, help="of the tokens, that is decay (default: %(default)s)"
    )
    command.add_argument("--shape", default="exponential", help="of the decays (default: %(default)s)")
    _add_law(command)

    def plan(options: argparse.Namespace, base: Recipe) -> Experiment:
        settings = ScalingSettings(
            sizes=_list(options.sizes, _size, "--sizes"),
            points=options.points,
            tokens_per_parameter=_list(options.tokens_per_parameter, float, "--tokens-per-parameter"),
            decay_share=options.decay_share,
            shape=options.shape,
            method=options.method,
            compute=_compute(options.compute),
        )
        return plan_scaling(base, settings, options.output)

    command.set_defaults(run=lambda options, script: _run(options, script, plan))


def _add_law(command: argparse.ArgumentParser) -> None:
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


def _fit(options: argparse.Namespace, script: Path) -> int:
    results = fit_csv(options.csv, options.method, _compute(options.compute), options.output)
    print(format_results(results, options.output))
    return 0


def _compute(value: float) -> float:
    if not 0 < value < math.inf:
        raise UserError(f"{value} FLOPs are no compute", where="--compute", fix="give a number, for instance 1e21")
    return value


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "report",
        help="print what experiments found, or write it as one page",
        description="Read results.json of experiments that have ended; nothing is run or measured again.",
    )
    command.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of experiments")
    command.add_argument("--output", type=Path, help="Markdown page to write (.md)")
    command.set_defaults(run=_report)


def _add_coordinates(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "coord-check",
        help="do activations and logits keep their size over width and depth? (Table 7)",
        description="Sizes of activations, of their changes and of logits after a few steps over widths and depths, in"
        " muP and in standard parametrisation, on the recipe's own tokens, rate and batch.",
    )
    _add_base(command)
    command.add_argument("--widths", default="128,256,512", help="of models of --layers (default: %(default)s)")
    command.add_argument("--layers", type=int, default=3, help="of the models of --widths (default: %(default)s)")
    command.add_argument("--depths", default="2,4,8,16", help="layers of models of --width (default: %(default)s)")
    command.add_argument("--width", type=int, default=128, help="of the models of --depths (default: %(default)s)")
    command.add_argument("--steps", type=int, default=10, help="of training (default: %(default)s)")
    command.add_argument("--seeds", default="1", help="seeds of each model (default: %(default)s)")
    command.set_defaults(run=_run_coordinates)


def _run_coordinates(options: argparse.Namespace, script: Path) -> int:
    settings = CoordinateSettings(
        widths=_list(options.widths, int, "--widths") if options.widths else (),
        layers=options.layers,
        depths=_list(options.depths, int, "--depths") if options.depths else (),
        width=options.width,
        steps=options.steps,
        seeds=_list(options.seeds, int, "--seeds"),
    )
    experiment = plan_coordinates(load_recipe(options.recipe, options.overrides), settings, options.output)
    if options.dry_run:
        print(format_plan(experiment))
        return 0
    only_our_lines()
    return run_experiment(experiment, lambda: run_coordinates(experiment, _say), _say)


def _add_common(command: argparse.ArgumentParser) -> None:
    _add_base(command)
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


def _add_base(command: argparse.ArgumentParser) -> None:
    command.add_argument("--recipe", required=True, metavar="FILE", help="YAML recipe that all runs are made of")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="change one value of the recipe")
    command.add_argument("--output", type=Path, required=True, help="folder of the experiment; made if need be")
    command.add_argument("--dry-run", action="store_true", help="print the runs and what they cost, and exit")


def _run(options: argparse.Namespace, script: Path, plan: Plan) -> int:
    launcher = Launcher.of(script, options.launcher, options.workers, options.devices)
    rate = options.flops_per_second
    if rate is not None and not rate > 0:
        raise UserError(f"{rate} is no rate", where="--flops-per-second", fix="give FLOP/s, for instance 2e14")
    experiment = plan(options, load_recipe(options.recipe, options.overrides))
    if options.dry_run:
        print(format_plan(experiment, rate, launcher.workers))
        return 0
    queue = Queue(experiment.cells, launcher, _say)
    return run_experiment(experiment, queue.run, _say, workers=launcher.workers)


def _say(line: str) -> None:
    print(line, flush=True)


def _report(options: argparse.Namespace, script: Path) -> int:
    found = [(folder, read_results(folder)) for folder in options.runs]
    if options.output is None:
        print("\n\n".join(format_results(results, folder) for folder, results in found))
        return 0
    if not options.output.resolve().parent.is_dir() or options.output.is_dir():
        raise UserError("cannot be written", where=str(options.output), fix="give a file in a folder that exists")
    write_bytes(options.output, format_markdown(found, options.output.parent).encode())
    print(f"report: {options.output}")
    return 0


def _list(text: str, convert: Callable[[str], T], where: str) -> tuple[T, ...]:
    try:
        return tuple(convert(part.strip()) for part in text.split(","))
    except ValueError:
        raise UserError(f"{text!r} is not a list that can be read", where=where, fix="separate by commas") from None


def _size(text: str) -> tuple[int, int]:
    width, layers = text.lower().split("x")
    if int(width) < 1 or int(layers) < 1:
        raise ValueError(text)
    return int(width), int(layers)


def _parametrization(text: str) -> Parametrization:
    found: list[Parametrization] = [name for name in PARAMETRIZATIONS if name == text]
    if not found:
        raise ValueError(text)
    return found[0]
