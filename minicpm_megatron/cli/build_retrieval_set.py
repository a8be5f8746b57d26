"""Make questions whose answer stands at a known place of a long text:

    minicpm build-retrieval-set --task passkey --corpus TEXT... --tokenizer DIR --lengths 256,1024 --output DIR

passkey, number_string and kv hide a key among text of the corpus or among other keys; qa asks for the word that is
missing from one of its sentences. Writes one JSON Lines file for each length and depth, and set.json. With
--train-prefix P also P.jsonl, other questions with their answers as text for `minicpm preprocess`. Killed and run
again, it goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from minicpm_megatron.cli.arguments import Parser
from minicpm_megatron.data.haystack import Haystack
from minicpm_megatron.data.retrieval import TASKS
from minicpm_megatron.data.retrieval_set import MAX_CORPUS_BYTES, Plan, build_set, write_training_text
from minicpm_megatron.data.tokenizers import load_tokenizer
from minicpm_megatron.errors import UserError

Number = TypeVar("Number", int, float)


def parser() -> Parser:
    """Return the parser; `--help` is its documentation."""
    result = Parser(description=__doc__)
    result.add_argument("--task", required=True, choices=tuple(TASKS), help="what the questions ask for")
    result.add_argument("--corpus", nargs="+", required=True, help="files or folders, as `minicpm preprocess` reads")
    result.add_argument("--tokenizer", required=True, help="tokenizer folder, or tokenizer.model")
    result.add_argument(
        "--lengths", required=True, help="tokens of <s>, question and answer, for example 256,1024,4096"
    )
    result.add_argument(
        "--depths", default="0,25,50,75,100", help="percent of the text before (default 0,25,50,75,100)"
    )
    result.add_argument("--samples", type=int, default=20, help="of each length and depth (default 20)")
    result.add_argument("--seed", type=int, default=0, help="decides everything that is drawn (default 0)")
    result.add_argument("--output", type=Path, required=True, help="folder of the set")
    result.add_argument("--train-prefix", type=Path, help="also write PREFIX.jsonl, text to train on")
    result.add_argument("--train-samples", type=int, default=100, help="of each length and depth in it (default 100)")
    result.add_argument("--json-key", default="text", help="member or column of the corpus's text (default: text)")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and write the set."""
    options = parser().parse_args(arguments)
    if options.train_samples < 1:
        raise UserError("give at least 1", where="--train-samples")
    plan = Plan(
        options.task,
        tuple(_numbers(options.lengths, int, "--lengths")),
        tuple(_numbers(options.depths, float, "--depths")),
        options.samples,
        options.seed,
    )
    haystack = Haystack.read(
        options.corpus, load_tokenizer(options.tokenizer), key=options.json_key, max_bytes=MAX_CORPUS_BYTES
    )
    there = build_set(plan, haystack, options.output)
    again = f", {there} of them already there" if there else ""
    print(f"{len(plan.cells())} files of {plan.samples} {plan.task} questions{again} in {options.output}")
    if options.train_prefix is not None:
        path = write_training_text(plan, haystack, options.train_prefix, samples=options.train_samples)
        print(f"{options.train_samples * len(plan.cells()):,} documents to train on in {path}")


def _numbers[Number: (int, float)](text: str, kind: Callable[[str], Number], option: str) -> list[Number]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{text!r} is not a list of numbers", where=option, fix="separate them by commas") from None
