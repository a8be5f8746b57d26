"""tools/build_retrieval_set.py and tools/evaluate_retrieval.py as a user runs them, with input right and wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from minicpm_megatron.convert import convert
from minicpm_megatron.data.tokenizer_training import train_tokenizer
from minicpm_megatron.storage.sharded import write_single
from tests.cli.commands import Mistake, check_mistake, command_with, tree, untouched
from tests.convert.conftest import random_tensors, small_model
from tests.data.conftest import texts, write_jsonl

PIECES = 600
BUILD = {
    "--task": "passkey",
    "--corpus": "corpus.jsonl",
    "--tokenizer": "tokenizer",
    "--lengths": "200,250",
    "--depths": "0,100",
    "--samples": "2",
    "--output": "out",
}
EVALUATE = {"--checkpoint": "model", "--tokenizer": "tokenizer", "--set": "set", "--output": "out"}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a tokenizer, a model and a set."""
    folder = tmp_path_factory.mktemp("sound")
    corpus = write_jsonl(folder / "corpus.jsonl", texts(100))
    train_tokenizer([str(corpus)], PIECES, folder / "tokenizer", show_progress=False)
    model = small_model(vocab_size=PIECES, num_layers=1, max_position_embeddings=250)
    write_single(folder / "model", random_tensors(model).items(), model.model_dump(mode="json"), {"step": 0})
    places = {key: str(folder / BUILD[key]) for key in ("--corpus", "--tokenizer")} | {"--output": str(folder / "set")}
    assert command_with("build_retrieval_set.py", BUILD | places) == 0
    return folder


def test_a_set_and_its_evaluation(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command_with("build_retrieval_set.py", BUILD | {"--train-prefix": "train", "--train-samples": "3"}) == 0
    output = capfd.readouterr().out.splitlines()
    assert output == ["4 files of 2 passkey questions in out", "12 documents to train on in train.jsonl"]
    assert tree(here / "out") == tree(here / "set")  # by another process, from another path
    assert len((here / "train.jsonl").read_text().splitlines()) == 12
    assert command_with("build_retrieval_set.py", BUILD) == 0
    assert "4 of them already there" in capfd.readouterr().out

    assert command_with("evaluate_retrieval.py", EVALUATE | {"--output": "results"}) == 0
    output = capfd.readouterr().out.splitlines()
    assert output[0].startswith("passkey, model") and output[2].split() == ["depth", "%", "200", "250", "tokens"]
    assert output[-1] == "results: results/results.json, picture: results/heat_map.png"
    results = json.loads((here / "results" / "results.json").read_text())
    assert [cell["samples"] for cell in results["cells"]] == [2] * 4
    before = tree(here / "results")
    assert command_with("evaluate_retrieval.py", EVALUATE | {"--output": "results"}) == 0
    assert tree(here / "results") == before

    (here / "runs" / "one" / "checkpoints").mkdir(parents=True)
    (here / "runs" / "one" / "checkpoints" / "step-0").symlink_to(here / "model")
    assert command_with("evaluate_retrieval.py", EVALUATE | {"--checkpoint": "one@0", "--output": "of-run"}) == 0
    assert json.loads((here / "of-run" / "results.json").read_text())["cells"] == results["cells"]

    # an exported folder gives the same numbers
    convert(here / "model", here / "llama", "llama", dtype="fp32", tokenizer=here / "tokenizer")
    options = {"--checkpoint": "llama", "--set": "set", "--output": "of-llama", "--max-length": "249"}
    assert command_with("evaluate_retrieval.py", options) == 0
    exported = json.loads((here / "of-llama" / "results.json").read_text())["cells"]
    assert [cell["length"] for cell in exported] == [200, 200]
    for ours, theirs in zip(results["cells"], exported, strict=False):
        assert ours["token_accuracy"] == theirs["token_accuracy"]
        assert ours["answer_loss"] == pytest.approx(theirs["answer_loss"], rel=1e-4)


def spoil(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


CASES: dict[str, Mistake] = {
    "set: missing corpus": ("build_retrieval_set.py", BUILD | {"--corpus": "no.jsonl"}, untouched, "no.jsonl"),
    "set: other key": ("build_retrieval_set.py", BUILD | {"--json-key": "body"}, untouched, "hardly a sentence"),
    "set: no tokenizer": ("build_retrieval_set.py", BUILD | {"--tokenizer": "no"}, untouched, "no such tokenizer"),
    "set: no such task": ("build_retrieval_set.py", BUILD | {"--task": "maze"}, untouched, "invalid choice: 'maze'"),
    "set: no numbers": ("build_retrieval_set.py", BUILD | {"--lengths": "1k"}, untouched, "--lengths: '1k' is not"),
    "set: no length": ("build_retrieval_set.py", BUILD | {"--lengths": "0"}, untouched, "--lengths: not a list"),
    "set: a length twice": ("build_retrieval_set.py", BUILD | {"--lengths": "200,200"}, untouched, "--lengths: not a"),
    "set: too short": ("build_retrieval_set.py", BUILD | {"--lengths": "30"}, untouched, "30 tokens are too few"),
    "set: too deep": ("build_retrieval_set.py", BUILD | {"--depths": "0,101"}, untouched, "--depths: not a list"),
    "set: depth nan": ("build_retrieval_set.py", BUILD | {"--depths": "nan"}, untouched, "--depths: not a list"),
    "set: no samples": ("build_retrieval_set.py", BUILD | {"--samples": "0"}, untouched, "--samples: 0 is not"),
    "set: no training": ("build_retrieval_set.py", BUILD | {"--train-samples": "0"}, untouched, "--train-samples"),
    "set: something in the way": (
        "build_retrieval_set.py",
        BUILD | {"--output": "model"},
        untouched,
        "the output exists already",
    ),
    "set: another set in the way": (
        "build_retrieval_set.py",
        BUILD | {"--output": "set", "--seed": "1"},
        untouched,
        "holds another set",
    ),
    "set: below a file": ("build_retrieval_set.py", BUILD | {"--output": "a-file/x"}, untouched, "cannot be written"),
    "evaluation: no set": ("evaluate_retrieval.py", EVALUATE | {"--set": "model"}, untouched, "model: no finished set"),
    "evaluation: half a set": (
        "evaluate_retrieval.py",
        EVALUATE,
        lambda folder: (folder / "set" / "length-200-depth-0.jsonl").unlink(),
        "missing from the set",
    ),
    "evaluation: a damaged set": (
        "evaluate_retrieval.py",
        EVALUATE,
        spoil("set/length-200-depth-0.jsonl", "{"),
        "length-200-depth-0.jsonl:1: not a JSON value",
    ),
    "evaluation: an empty file": (
        "evaluate_retrieval.py",
        EVALUATE,
        spoil("set/length-200-depth-0.jsonl", ""),
        "no question",
    ),
    "evaluation: a damaged description": ("evaluate_retrieval.py", EVALUATE, spoil("set/set.json", "[]"), "set.json"),
    "evaluation: no model": ("evaluate_retrieval.py", EVALUATE | {"--checkpoint": "no"}, untouched, "no such folder"),
    "evaluation: no length left": (
        "evaluate_retrieval.py",
        EVALUATE | {"--max-length": "10"},
        untouched,
        "--max-length: leaves nothing",
    ),
    "evaluation: no length": ("evaluate_retrieval.py", EVALUATE | {"--max-length": "0"}, untouched, "at least 1"),
    "evaluation: something in the way": (
        "evaluate_retrieval.py",
        EVALUATE | {"--output": "model"},
        untouched,
        "the output exists already",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_mistake_is_one_line(case: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    check_mistake(CASES[case], here, capfd)
