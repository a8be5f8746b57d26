"""The parser of `minicpm windtunnel`, made of those of its subcommands."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from minicpm_megatron.cli import launched
from minicpm_megatron.cli.arguments import Parser
from minicpm_megatron.errors import UserError

if TYPE_CHECKING:
    from minicpm_megatron.cli.windtunnel.options import Run

DESCRIPTION = """The paper's experiments (arXiv 2404.06395, sections 3 and 4) on models as small as your machine wants.

  minicpm windtunnel lr --recipe R.yaml --sizes 64x4,128x6 --output runs/lr --dry-run
  minicpm windtunnel lr --recipe R.yaml --sizes 64x4,128x6 --output runs/lr --workers 2
  minicpm windtunnel scaling-law --recipe R.yaml --sizes 64x4,128x6,256x8 --output runs/law
  minicpm windtunnel fit --csv losses.csv
  minicpm windtunnel tokens-per-size --csv curves.csv
  minicpm windtunnel report --runs runs/lr runs/wsd --output runs/report.html
  minicpm windtunnel all --plan examples/windtunnel/cpu.yaml --output runs/windtunnel

Every experiment is made of runs of examples/train.py with your recipe and overrides. Killed or stopped, the same
command goes on where it was; started several times on a shared folder, on one machine or many, the runs are divided
between the starts. docs/windtunnel.md says what each measures and where it stands in the paper."""

SUBCOMMANDS = {
    "lr": ("rates", "does the best learning rate move with the size? (section 3.3)"),
    "batch-size": ("batches", "which batch size needs the fewest tokens for a loss? (section 3.2)"),
    "search": ("search", "are the paper's scale_depth, scale_emb, init_std and rate the best? (section 3.1)"),
    "wsd": ("decays", "how long a decay must be, and whether WSD matches Cosine (sections 4.1 to 4.3)"),
    "decay-study": ("decay_study", "what gradients and updates do in the decay (section 4.4)"),
    "coord-check": ("coordinates", "do activations and logits keep their size over width and depth? (Table 7)"),
    "scaling-law": ("scaling_law", "the scaling law from one stable run a size (section 4.5)"),
    "envelope": ("envelope", "what does a small model reach that is trained ever longer? (section 4.3)"),
    "fit": ("fit", "the scaling law of losses that you have (section 4.5)"),
    "tokens-per-size": (
        "tokens_per_size",
        "where the loss curves of a family of sizes meet (section 4.5, the estimate for Llama 2)",
    ),
    "report": ("report", "print what experiments found, or write it as one page"),
    "all": ("everything", "all experiments of a plan, and their report"),
}
"""Name -> its module here, and its line in the list of all."""
TRAINER = Path(launched.__file__).with_name("train.py")
STATUS = {"done": 0, "stopped": 0, "failed": 1}


def parser(asked: str | None = None) -> argparse.ArgumentParser:
    """The parser; `--help` of each subcommand is its documentation.

    Args:
        asked: the only subcommand that gets its options. All modules together take half a second to import.
    """
    result: argparse.ArgumentParser = Parser(description=DESCRIPTION)
    commands = result.add_subparsers(dest="command", required=True, metavar="SUBCOMMAND")
    for name, (module, summary) in SUBCOMMANDS.items():
        if name == asked:
            import_module(f"minicpm_megatron.cli.windtunnel.{module}").add(commands)
        else:
            commands.add_parser(name, help=summary)
    return result


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the command line.

    Raises:
        UserError: a subcommand or an argument is unknown, missing or cannot be read.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and not words[0].startswith("-") and words[0] not in SUBCOMMANDS:
        near = difflib.get_close_matches(words[0].lower().replace("_", "-"), SUBCOMMANDS, n=1)
        fix = f"did you mean {near[0]}?" if near else f"there are {', '.join(SUBCOMMANDS)}"
        raise UserError(f"no subcommand {words[0]!r}", where="windtunnel", fix=fix)
    command = parser(words[0] if words else None)
    options, left = command.parse_known_args(words)
    # overrides that stand apart; argparse itself takes only those that stand together
    if left and ("overrides" not in options or any(word.startswith("-") for word in left)):
        command.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        options.overrides += left
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 1 where a run has failed.

    Raises:
        UserError: the input is wrong.
    """
    options = parse(arguments)
    run: Run = options.run
    return STATUS[run(options, TRAINER)]
