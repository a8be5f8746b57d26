"""The `minicpm` command: every command of the project under one name."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from minicpm_megatron import __version__
from minicpm_megatron.cli.arguments import Parser
from minicpm_megatron.errors import UserError

PROGRAM = "minicpm"


class Command(NamedTuple):
    """One command.

    Attributes:
        module: below `minicpm_megatron.cli`, with `parser()` and `main(arguments)`; imported when it is called.
        script: the file in the checkout that is the same, "" where there is none.
        summary: its line in `minicpm --help`.
    """

    module: str
    script: str
    summary: str


COMMANDS = {
    "build-sample-corpus": Command(
        "build_sample_corpus", "tools/build_sample_corpus.py", "make a small corpus of English, Chinese and code"
    ),
    "train-tokenizer": Command("train_tokenizer", "tools/train_tokenizer.py", "train a tokenizer"),
    "preprocess": Command("preprocess", "tools/preprocess_data.py", "turn raw text into tokens, Megatron's .bin/.idx"),
    "plan": Command("plan", "tools/plan.py", "find the layout to train with on a cluster, by formula"),
    "train": Command("train", "examples/train.py", "train a model as a recipe says"),
    "compare": Command("compare", "tools/compare_runs.py", "compare runs by tokens, FLOPs and validation loss"),
    "generate": Command("generate", "tools/generate.py", "continue a prompt with a trained model"),
    "convert": Command(
        "convert", "tools/convert_checkpoint.py", "convert between our checkpoints, Megatron's and Hugging Face's"
    ),
    "upcycle": Command("upcycle", "tools/upcycle.py", "make a mixture of experts of a dense model"),
    "build-retrieval-set": Command(
        "build_retrieval_set", "tools/build_retrieval_set.py", "make questions whose answer stands in a long text"
    ),
    "evaluate-retrieval": Command(
        "evaluate_retrieval", "tools/evaluate_retrieval.py", "measure what a model finds in long texts"
    ),
    "evaluate-positions": Command(
        "evaluate_positions", "tools/evaluate_positions.py", "measure the loss by position in long documents"
    ),
    "windtunnel": Command("windtunnel.main", "tools/windtunnel.py", "run the paper's experiments on small models"),
    "info": Command("info", "", "print versions and devices, for a report of a fault"),
}


def main(arguments: Sequence[str] | None = None) -> int | None:
    """Run the command that the first word names.

    Raises:
        UserError: no command has that name, or the command refuses its input.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # `deepspeed --module minicpm_megatron train` puts it before the command; the environment says the same
    if words and words[0].startswith("--local_rank="):
        del words[0]
    if not words or words[0].startswith("-"):
        parser().parse_args(words or ["--help"])
        return 0
    name, *rest = words
    if name not in COMMANDS:
        nearest = _nearest(name)
        fix = f"did you mean {nearest}?" if nearest else f"{PROGRAM} --help lists all"
        raise UserError(f"no command {name!r}", where=PROGRAM, fix=fix)
    sys.argv = [f"{PROGRAM} {name}", *rest]  # which argparse takes the program's name from
    command: int | None = import_module(f"minicpm_megatron.cli.{COMMANDS[name].module}").main(rest)
    return command


def parser() -> Parser:
    """Return the parser of what stands in place of a command."""
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    result = Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [-h] [--version] COMMAND ...",
        description="MiniCPM (arXiv 2404.06395) on Megatron-Core, driven by DeepSpeed.",
        epilog=f"commands:\n{lines}\n\n{PROGRAM} COMMAND --help explains each. Several processes train with\n"
        "  deepspeed --num_gpus N examples/train.py --recipe R.yaml\n"
        "  torchrun --nproc_per_node N -m minicpm_megatron train --recipe R.yaml",
    )
    result.add_argument("--version", action="version", version=f"minicpm_megatron {__version__}", help="print it")
    result.add_argument("COMMAND", nargs="?", help=argparse.SUPPRESS)
    return result


def _nearest(name: str) -> str | None:
    """The command that a wrong name is most like; the name of a script in tools/ means its command."""
    meant = {command.script.rpartition("/")[2].removesuffix(".py"): each for each, command in COMMANDS.items()}
    meant |= {each: each for each in COMMANDS}
    known = [each for each in meant if each]
    for written in (name.replace("-", "_").removesuffix(".py"), name.lower().replace("_", "-")):
        found = difflib.get_close_matches(written, known, n=1)
        if found:
            return meant[found[0]]
    return None
