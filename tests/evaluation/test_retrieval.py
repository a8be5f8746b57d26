"""The evaluator with readers whose accuracy is known, and with a real model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
import torch

from minicpm_megatron.convert.generation import Generator
from minicpm_megatron.data.haystack import Haystack
from minicpm_megatron.data.retrieval_set import Plan, RetrievalSet, build_set, open_set
from minicpm_megatron.data.tokenizer_training import train_tokenizer
from minicpm_megatron.data.tokenizers.sentencepiece import SentencePieceTokenizer
from minicpm_megatron.errors import UserError
from minicpm_megatron.evaluation.heat_map import draw_heat_map
from minicpm_megatron.evaluation.retrieval import RESULTS, Cell, evaluate, table
from minicpm_megatron.storage.sharded import write_single
from tests.cli.commands import tree
from tests.convert.conftest import random_tensors, small_model
from tests.data.conftest import texts, write_jsonl

LENGTHS, DEPTHS, SAMPLES = (220, 300), (0.0, 50.0, 100.0), 4
IDENTITY = {"model": "a test"}


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("retrieval")
    train_tokenizer([str(write_jsonl(folder / "c.jsonl", texts()))], 900, folder / "tok", show_progress=False)
    return folder / "tok"


@pytest.fixture(scope="module")
def questions(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> RetrievalSet:
    folder = tmp_path_factory.mktemp("sets") / "passkey"
    plan = Plan("passkey", LENGTHS, DEPTHS, SAMPLES, seed=0)
    build_set(plan, Haystack(texts(), SentencePieceTokenizer(tokenizer_dir)), folder, show_progress=False)
    return open_set(folder)


class Fake:
    """Answers by a rule: `answer_of` makes the text of the answer from the prompt."""

    longest = 1000

    def __init__(self, folder: Path) -> None:
        self.tokenizer = SentencePieceTokenizer(folder)
        self.asked: list[int] = []

    def encode(self, text: str) -> list[int]:
        return [1, *self.tokenizer.encode(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens)

    def answer_of(self, prompt: str) -> str:
        raise NotImplementedError

    def greedy(self, tokens: Sequence[int], new: int) -> list[int]:
        self.asked.append(len(tokens))
        prompt = self.decode(tokens[1:])
        return self.encode(f"{prompt} {self.answer_of(prompt)}")[len(tokens) :][:new]

    def logits(self, tokens: Sequence[int], last: int) -> torch.Tensor:
        prompt = tokens[: len(tokens) + 1 - last]
        wanted = self.greedy(prompt, last)
        self.asked.pop()
        return 20.0 * torch.nn.functional.one_hot(torch.tensor(wanted), self.tokenizer.vocab_size).float()


class Oracle(Fake):
    """Copies the key from the text."""

    def answer_of(self, prompt: str) -> str:
        return re.findall(r"(\d{5}) is the pass key", prompt)[0]


class Guesser(Fake):
    """Says any five digits."""

    random = Random(0)

    def answer_of(self, prompt: str) -> str:
        return f"{self.random.randrange(10**5):05d}"


class NearSighted(Oracle):
    """Sees the last 80 characters of the text, as what is hidden near the question is."""

    def answer_of(self, prompt: str) -> str:
        return (re.findall(r"(\d{5}) is the pass key", prompt[-80:]) or ["00000"])[0]


def run(reader: Fake, questions: RetrievalSet, output: Path, **options: int) -> list[Cell]:
    return evaluate(reader, questions, output, identity=IDENTITY, show_progress=False, **options)  # type: ignore[arg-type]


def test_an_oracle_is_always_right(questions: RetrievalSet, tokenizer_dir: Path, tmp_path: Path) -> None:
    cells = run(Oracle(tokenizer_dir), questions, tmp_path / "out")
    assert [(cell.length, cell.depth, cell.samples) for cell in cells] == [
        (length, depth, SAMPLES) for length in LENGTHS for depth in DEPTHS
    ]
    assert all((cell.exact_match, cell.token_accuracy) == (1.0, 1.0) and cell.answer_loss < 1e-4 for cell in cells)
    results = json.loads((tmp_path / "out" / RESULTS).read_text())
    assert results["model"] == "a test" and results["overall"]["exact_match"] == 1.0
    assert len(results["cells"]) == len(LENGTHS) * len(DEPTHS)
    outcomes = [json.loads(line) for line in (tmp_path / "out" / "length-220-depth-50.jsonl").read_text().splitlines()]
    assert [outcome["tokens"] for outcome in outcomes] == [220] * SAMPLES
    assert all(outcome["found"] == outcome["answer"] for outcome in outcomes)


def test_a_guesser_is_hardly_ever_right(questions: RetrievalSet, tokenizer_dir: Path, tmp_path: Path) -> None:
    cells = run(Guesser(tokenizer_dir), questions, tmp_path / "out")
    assert all(cell.exact_match == 0.0 for cell in cells)
    # one digit in ten, and the word boundary before them where it is a token of its own
    assert 0.02 < sum(cell.token_accuracy for cell in cells) / len(cells) < 0.45


def test_cells_tell_where_a_model_fails(questions: RetrievalSet, tokenizer_dir: Path, tmp_path: Path) -> None:
    cells = run(NearSighted(tokenizer_dir), questions, tmp_path / "out")
    assert {cell.depth: cell.exact_match for cell in cells} == {0.0: 0.0, 50.0: 0.0, 100.0: 1.0}
    lines = table(cells).splitlines()
    assert lines[1].split() == ["depth", "%", "220", "300", "tokens"]
    assert lines[4].split()[:2] == ["100", "100.0"] and lines[2].split()[:2] == ["0", "0.0"]
    assert lines[5].startswith("all: 33.3 / ")


def test_an_interrupted_evaluation_goes_on_after_the_last_cell(
    questions: RetrievalSet, tokenizer_dir: Path, tmp_path: Path
) -> None:
    class Tired(Oracle):
        def greedy(self, tokens: Sequence[int], new: int) -> list[int]:
            if len(self.asked) == 2 * SAMPLES + 1:
                raise KeyboardInterrupt
            return super().greedy(tokens, new)

    with pytest.raises(KeyboardInterrupt):
        run(Tired(tokenizer_dir), questions, tmp_path / "cut")
    assert not (tmp_path / "cut" / RESULTS).exists()
    fresh = Oracle(tokenizer_dir)
    cells = run(fresh, questions, tmp_path / "cut")
    assert len(fresh.asked) == (len(cells) - 2) * SAMPLES
    run(Oracle(tokenizer_dir), questions, tmp_path / "whole")
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")
    # a cell that is cut off is asked again
    path = tmp_path / "cut" / "length-220-depth-0.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    again = Oracle(tokenizer_dir)
    run(again, questions, tmp_path / "cut")
    assert len(again.asked) == SAMPLES
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_results_of_something_else_are_not_mixed(questions: RetrievalSet, tokenizer_dir: Path, tmp_path: Path) -> None:
    run(Oracle(tokenizer_dir), questions, tmp_path / "out")
    with pytest.raises(UserError, match="holds results of something else"):
        evaluate(Oracle(tokenizer_dir), questions, tmp_path / "out", identity={"model": "another"})


def test_questions_beyond_the_context(questions: RetrievalSet, tokenizer_dir: Path, tmp_path: Path) -> None:
    reader = Oracle(tokenizer_dir)
    reader.longest = 299
    with pytest.raises(UserError, match="300 tokens do not fit the model's context of 299; .*--max-length 299"):
        run(reader, questions, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert {cell.length for cell in run(reader, questions, tmp_path / "out", max_length=299)} == {220}
    with pytest.raises(UserError, match="--max-length: leaves nothing; the shortest is 220"):
        run(reader, questions, tmp_path / "none", max_length=100)


def test_the_heat_map_is_drawn(tmp_path: Path) -> None:
    from matplotlib import image

    cells = [Cell(length, depth, 1, depth / 100, 0.5, 1.0) for length in LENGTHS for depth in DEPTHS]
    pixels = image.imread(draw_heat_map(cells, "a test", tmp_path))
    assert min(pixels.shape[:2]) > 200
    # white page, both ends of the scale
    colours = {tuple(round(float(part), 1) for part in pixel[:3]) for row in pixels[::4] for pixel in row[::4]}
    assert {(1.0, 1.0, 1.0), (0.3, 0.0, 0.3), (1.0, 0.9, 0.1)} <= colours


@pytest.mark.parametrize("scaling", ["none", "dynamic"])
def test_a_real_model_is_read_the_same_way_twice(
    scaling: str, questions: RetrievalSet, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """Greedy text is right exactly where every token is the likeliest: the two measures check each other."""
    changes = {"max_position_embeddings": 300}
    if scaling == "dynamic":
        changes = {"max_position_embeddings": 100, "rope_scaling": {"type": "dynamic", "factor": 4.0}}
    shape = small_model(vocab_size=900, num_layers=2, **changes)
    write_single(tmp_path / "model", random_tensors(shape).items(), shape.model_dump(mode="json"), {"step": 0})
    generator = Generator(tmp_path / "model", tokenizer_dir, dtype=torch.float32)
    cells = evaluate(generator, questions, tmp_path / "out", identity=IDENTITY, show_progress=False)
    assert all(cell.exact_match == 0.0 and cell.answer_loss > 1 for cell in cells)
    prompt = generator.encode("The pass key is")
    found = generator.greedy(prompt, 3)
    likeliest = generator.logits([*prompt, *found[:-1]], len(found)).argmax(-1)
    assert likeliest.tolist() == found
