"""tools/*.py with input that is wrong: exactly one error line, exit status 2, and the disk as it was."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from minicpm_megatron.data.tokenizer_training import train_tokenizer
from minicpm_megatron.storage.sharded import write_single
from tests.cli.commands import ROOT, Mistake, check_mistake, command, command_with, untouched
from tests.convert.conftest import random_tensors, small_model
from tests.data.conftest import texts, write_jsonl

PIECES = 600


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the commands need, none of it wrong."""
    folder = tmp_path_factory.mktemp("sound")
    corpus = write_jsonl(folder / "corpus.jsonl", texts(100))
    for name, size in (("tokenizer", PIECES), ("larger", PIECES + 100)):
        train_tokenizer([str(corpus)], size, folder / name, show_progress=False)
    model = small_model(vocab_size=PIECES, num_layers=1)
    write_single(folder / "model", random_tensors(model).items(), model.model_dump(mode="json"), {"step": 0})
    return folder


def garbage(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(bytes(range(256)) * 8)


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def add_a_bad_line(folder: Path) -> None:
    with open(folder / "corpus.jsonl", "a") as handle:
        handle.write('{"text": "cut o\n')


def flip_a_bit(name: str) -> Callable[[Path], object]:
    def flip(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[-100] ^= 1
        (folder / name).write_bytes(content)

    return flip


TRAIN = {"--input": "corpus.jsonl", "--vocab-size": "600", "--output": "out"}
PREPROCESS = {"--input": "corpus.jsonl", "--tokenizer": "tokenizer", "--output-prefix": "out", "--workers": "1"}
CONVERT = {"--input": "model", "--to": "llama", "--tokenizer": "tokenizer", "--output": "out"}
GENERATE = {"--checkpoint": "model", "--tokenizer": "tokenizer", "--prompt": "x", "--max-new-tokens": "2"}
CORPUS = {"--output": "out"}
MODEL_FILE = "model/tensor-00000.safetensors"

CASES: dict[str, Mistake] = {
    "tokenizer: missing input": ("train_tokenizer.py", TRAIN | {"--input": "no.jsonl"}, untouched, "no.jsonl"),
    "tokenizer: unknown format": ("train_tokenizer.py", TRAIN | {"--input": "a-file"}, untouched, "unknown format"),
    "tokenizer: other key": ("train_tokenizer.py", TRAIN | {"--json-key": "body"}, untouched, "missing_key"),
    "tokenizer: too few pieces": ("train_tokenizer.py", TRAIN | {"--vocab-size": "200"}, untouched, "--vocab-size"),
    "tokenizer: too many pieces": (
        "train_tokenizer.py",
        TRAIN | {"--vocab-size": "99999"},
        untouched,
        "no tokenizer of 99999 pieces",
    ),
    "tokenizer: no number": ("train_tokenizer.py", TRAIN | {"--vocab-size": "many"}, untouched, "--vocab-size"),
    "tokenizer: no sample": ("train_tokenizer.py", TRAIN | {"--max-sample-mb": "0"}, untouched, "--max-sample-mb"),
    "tokenizer: output in the way": ("train_tokenizer.py", TRAIN | {"--output": "tokenizer"}, untouched, "exists"),
    "corpus: output in the way": ("build_sample_corpus.py", CORPUS | {"--output": "tokenizer"}, untouched, "exists"),
    "corpus: no size": ("build_sample_corpus.py", CORPUS | {"--size-mb": "nan"}, untouched, "--size-mb"),
    "tokens: missing input": ("preprocess_data.py", PREPROCESS | {"--input": "no.jsonl"}, untouched, "no.jsonl"),
    "tokens: no tokenizer": (
        "preprocess_data.py",
        PREPROCESS | {"--tokenizer": "none"},
        untouched,
        "no such tokenizer",
    ),
    "tokens: garbage for a tokenizer": (
        "preprocess_data.py",
        PREPROCESS,
        garbage("tokenizer/tokenizer.model"),
        "not a sentencepiece model",
    ),
    "tokens: a cut tokenizer": ("preprocess_data.py", PREPROCESS, cut("tokenizer/tokenizer.model"), "not a sentencep"),
    "tokens: nothing but garbage": (
        "preprocess_data.py",
        PREPROCESS | {"--input": "g.parquet"},
        garbage("g.parquet"),
        "no document in 1 records (1 corrupt_stream)",
    ),
    "tokens: bad line, fatal": (
        "preprocess_data.py",
        PREPROCESS | {"--on-error": "fail"},
        add_a_bad_line,
        "record rejected (invalid_json",
    ),
    "tokens: other tokens in the way": (
        "preprocess_data.py",
        PREPROCESS,
        lambda folder: (folder / "out.bin").write_bytes(b""),
        "out.bin: the output exists already",
    ),
    "export: missing input": (
        "convert_checkpoint.py",
        CONVERT | {"--input": "none"},
        untouched,
        "none: no such folder",
    ),
    "export: not a model": ("convert_checkpoint.py", CONVERT | {"--input": "tokenizer"}, untouched, "not a model"),
    "export: no such format": (
        "convert_checkpoint.py",
        CONVERT | {"--to": "gguf"},
        untouched,
        "invalid choice: 'gguf'",
    ),
    "export: flipped bit": ("convert_checkpoint.py", CONVERT, flip_a_bit(MODEL_FILE), "the checkpoint is damaged"),
    "export: cut weights": ("convert_checkpoint.py", CONVERT, cut(MODEL_FILE), "the checkpoint is damaged"),
    "export: garbage manifest": ("convert_checkpoint.py", CONVERT, garbage("model/manifest.json"), "manifest.json"),
    "export: another tokenizer": (
        "convert_checkpoint.py",
        CONVERT | {"--tokenizer": "larger"},
        untouched,
        "the tokenizer has 700 pieces, the model's vocabulary 600",
    ),
    "export: no size": ("convert_checkpoint.py", CONVERT | {"--max-shard-size": "big"}, untouched, "--max-shard-size"),
    "export: output in the way": ("convert_checkpoint.py", CONVERT | {"--output": "tokenizer"}, untouched, "not empty"),
    "export: output below a file": (
        "convert_checkpoint.py",
        CONVERT | {"--output": "a-file/out"},
        untouched,
        "cannot be written",
    ),
    "text: missing model": ("generate.py", GENERATE | {"--checkpoint": "none"}, untouched, "none: no such folder"),
    "text: no tokenizer": ("generate.py", GENERATE | {"--tokenizer": "none"}, untouched, "none: no tokenizer.json"),
    "text: another tokenizer": (
        "generate.py",
        GENERATE | {"--tokenizer": "larger"},
        untouched,
        "the tokenizer has 700 pieces, the model's vocabulary 600",
    ),
    "text: flipped bit": ("generate.py", GENERATE, flip_a_bit(MODEL_FILE), "the checkpoint is damaged"),
    "text: temperature": ("generate.py", GENERATE | {"--temperature": "nan"}, untouched, "--temperature"),
    "text: a temperature that fp32 cannot divide by": (
        "generate.py",
        GENERATE | {"--temperature": "1e-300"},
        untouched,
        "--temperature: 1e-300 is too small",
    ),
    "text: a prompt that is no text": (
        "generate.py",
        GENERATE | {"--prompt": "caf\udce9"},
        untouched,
        "--prompt: character 4 is not UTF-8 text",
    ),
    "text: top-p": ("generate.py", GENERATE | {"--top-p": "0"}, untouched, "--top-p"),
    "text: seed": ("generate.py", GENERATE | {"--seed": str(1 << 70)}, untouched, "--seed"),
    "text: a prompt beyond the context": ("generate.py", GENERATE | {"--prompt": "x y " * 200}, untouched, "--prompt"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_mistake_is_one_line(case: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # what is finished of a preprocessing stays for the next one
    check_mistake(CASES[case], here, capfd, kept="out.work")


@pytest.mark.parametrize(
    ("script", "options"),
    [("preprocess_data.py", PREPROCESS), ("convert_checkpoint.py", CONVERT), ("generate.py", GENERATE)],
)
def test_the_same_commands_run_when_nothing_is_wrong(script: str, options: dict[str, str], here: Path) -> None:
    assert command_with(script, options) == 0


def test_nothing_stays_of_an_input_without_documents(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "empty.jsonl").write_text('{"text": ""}\n' * 3)
    assert command_with("preprocess_data.py", PREPROCESS | {"--input": "empty.jsonl"}) == 2
    assert "no document in 3 records" in capfd.readouterr().err
    assert not list(here.glob("out*"))


SCRIPTS = sorted(path.name for path in (ROOT / "tools").glob("*.py"))


@pytest.mark.parametrize("script", [*SCRIPTS, "train.py"])
def test_a_mistake_in_the_arguments_is_one_line(script: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert command(script, "--no-such-option") == 2
    said = capfd.readouterr()
    assert said.out == "" and said.err.startswith(f"error: {script}: ") and said.err.count("\n") == 1
    assert said.err.endswith("; --help says more\n")
