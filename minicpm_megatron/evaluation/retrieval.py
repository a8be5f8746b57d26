"""How well a model finds what a long text hides: accuracy by length and depth.

Two measures of every sample. Exact match: the greedy continuation is the answer. Token accuracy: the share of the
answer's tokens that are the likeliest ones after the prompt and the answer so far, which tells more of small models.
A cell that is done is on disk, so an interrupted evaluation goes on after it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from minicpm_megatron.data.progress import progress_bar
from minicpm_megatron.data.retrieval import Sample
from minicpm_megatron.data.retrieval_set import RetrievalSet, cell_name, read_samples
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.atomic import write_bytes, write_json
from minicpm_megatron.storage.claim import claim

RESULTS = "results.json"


class Reader(Protocol):
    """A model as this file needs it; `convert.generation.Generator` is one.

    Attributes:
        longest: tokens of the longest sequence that it takes.
    """

    longest: int

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, <s> first."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`."""

    def logits(self, tokens: Sequence[int], last: int) -> torch.Tensor:
        """[last, vocabulary] at the last positions of `tokens`."""

    def greedy(self, tokens: Sequence[int], new: int) -> list[int]:
        """The likeliest next tokens, one after the other, `new` of them at most."""


@dataclass(frozen=True)
class Outcome:
    """What a model made of one sample.

    Attributes:
        id: of the sample.
        tokens: of <s>, prompt and answer, by the model's tokenizer.
        found: the greedy continuation, as long in tokens as the answer.
        exact_match: whether that is the answer.
        token_accuracy: share of the answer's tokens that are the likeliest, the answer before them given.
        answer_loss: nats a token of the answer.
    """

    id: str
    tokens: int
    answer: str
    found: str
    exact_match: bool
    token_accuracy: float
    answer_loss: float


@dataclass(frozen=True)
class Cell:
    """Means over the samples of one length and depth."""

    length: int
    depth: float
    samples: int
    exact_match: float
    token_accuracy: float
    answer_loss: float


def ask(reader: Reader, sample: Sample) -> Outcome:
    """One sample.

    Raises:
        UserError: the model's tokenizer does not let prompt and answer be told apart, or they are too long for it.
    """
    prompt, whole = reader.encode(sample.prompt), reader.encode(sample.text)
    answer = whole[len(prompt) :]
    if whole[: len(prompt)] != prompt or not answer:
        raise UserError(
            "the model's tokenizer joins the end of the question to the answer",
            where=sample.id,
            fix="evaluate with the tokenizer that the set was built with",
        )
    if len(whole) > reader.longest:
        raise UserError(
            f"{len(whole)} tokens do not fit a context of {reader.longest}",
            where=sample.id,
            fix="leave longer questions out with --max-length",
        )
    logits = reader.logits(whole[:-1], len(answer))
    wanted = torch.tensor(answer)
    found = reader.decode(reader.greedy(prompt, len(answer)))
    return Outcome(
        sample.id,
        len(whole),
        sample.answer,
        found,
        found.strip() == sample.answer,
        float((logits.argmax(-1) == wanted).double().mean()),
        float(torch.nn.functional.cross_entropy(logits.float(), wanted)),
    )


def evaluate(
    reader: Reader,
    questions: RetrievalSet,
    output: Path,
    *,
    identity: Mapping[str, Any],
    max_length: int | None = None,
    show_progress: bool = True,
) -> list[Cell]:
    """Ask everything, and write one file of outcomes a cell and `results.json` into `output`.

    Args:
        output: a folder; made if need be. Cells that are in it already are not asked again.
        identity: what the results are of, as JSON values; other results in `output` are refused.
        max_length: leave longer cells out.

    Returns:
        All cells, by length and then depth.

    Raises:
        UserError: `output` holds other results, a file of the set is damaged, or a question does not fit the model.
    """
    wanted = [cell for cell in questions.cells if max_length is None or cell[0] <= max_length]
    if not wanted:
        raise UserError("leaves nothing", where="--max-length", fix=f"the shortest is {min(questions.cells)[0]}")
    longest = max(length for length, _ in wanted)
    if longest > reader.longest:
        raise UserError(
            f"{longest} tokens do not fit the model's context of {reader.longest}",
            where=str(questions.folder),
            fix=f"leave longer questions out: --max-length {reader.longest}",
        )
    samples = {cell: read_samples(questions.cells[cell]) for cell in wanted}
    for cell, found in samples.items():
        if not found:
            raise UserError("no question", where=str(questions.cells[cell]), fix="build the set again")
    claim(output, identity, "holds results of something else")
    cells, number = [], 0
    total = sum(map(len, samples.values()))
    with progress_bar(total=total, unit=" questions", disable=not show_progress) as bar:
        for (length, depth), questions_of_cell in samples.items():
            path = output / cell_name(length, depth)
            outcomes = _done(path, questions_of_cell)
            if outcomes is None:
                outcomes = []
                for sample in questions_of_cell:
                    outcomes.append(ask(reader, sample))
                    bar.update()
                lines = (json.dumps(asdict(outcome), ensure_ascii=False) + "\n" for outcome in outcomes)
                write_bytes(path, "".join(lines).encode())
            cells.append(_mean(length, depth, outcomes))
            number += len(outcomes)
            bar.update(number - bar.n)
    write_json(output / RESULTS, {**identity, "cells": [asdict(cell) for cell in cells], "overall": _overall(cells)})
    return cells


def _done(path: Path, samples: list[Sample]) -> list[Outcome] | None:
    """The outcomes of an earlier start, if they are those of these samples."""
    if not path.is_file():
        return None
    try:
        outcomes = [Outcome(**json.loads(line)) for line in path.read_bytes().splitlines()]
    except (ValueError, TypeError, RecursionError):
        return None
    return outcomes if [each.id for each in outcomes] == [sample.id for sample in samples] else None


def _mean(length: int, depth: float, outcomes: list[Outcome]) -> Cell:
    count = len(outcomes)
    return Cell(
        length,
        depth,
        count,
        sum(each.exact_match for each in outcomes) / count,
        sum(each.token_accuracy for each in outcomes) / count,
        sum(each.answer_loss for each in outcomes) / count,
    )


def _overall(cells: list[Cell]) -> dict[str, float]:
    measures = ("exact_match", "token_accuracy", "answer_loss")
    count = sum(cell.samples for cell in cells)
    return {name: sum(getattr(cell, name) * cell.samples for cell in cells) / count for name in measures}


def table(cells: list[Cell]) -> str:
    """Exact match and token accuracy in percent, a line a depth and a column a length."""
    lengths, depths = sorted({cell.length for cell in cells}), sorted({cell.depth for cell in cells})
    places = {(cell.length, cell.depth): cell for cell in cells}
    lines = ["exact match / token accuracy, %"]
    lines.append("depth %" + "".join(f"{length:>16,}" for length in lengths) + "  tokens")
    for depth in depths:
        row = (places[length, depth] for length in lengths)
        texts = (f"{100 * cell.exact_match:.1f} / {100 * cell.token_accuracy:.1f}" for cell in row)
        lines.append(f"{depth:>7g}" + "".join(f"{text:>16}" for text in texts))
    overall = _overall(cells)
    lines.append(
        f"all: {100 * overall['exact_match']:.1f} / {100 * overall['token_accuracy']:.1f},"
        f" {overall['answer_loss']:.3f} nats a token of the answers"
    )
    return "\n".join(lines)
