"""Training is deterministic, reports what it measured, and leaves nothing behind when it cannot be done."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minicpm_megatron.data.tokenizer_training import compression_table, train_tokenizer
from minicpm_megatron.data.tokenizers.sentencepiece import SentencePieceTokenizer
from minicpm_megatron.errors import UserError
from tests.data.conftest import texts, write_jsonl

REPOSITORY = Path(__file__).resolve().parents[2]


def tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "tools" / name), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_tool(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "tok"
    done = tool("train_tokenizer.py", "--input", corpus, "--vocab-size", "600", "--output", output)
    assert done.returncode == 0, done.stderr
    report = json.loads((output / "tokenizer_report.json").read_text())
    assert f"{report['inputs'][0]['tokens']:,}" in done.stdout
    assert f"{report['inputs'][0]['bytes_per_token']:.3f}" in done.stdout


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("train_tokenizer.py", ["--input", "missing.jsonl", "--vocab-size", "600", "--output", "out"]),
        ("train_tokenizer.py", ["--input", str(Path(__file__)), "--vocab-size", "600", "--output", "out"]),
        ("build_sample_corpus.py", ["--output", str(Path(__file__))]),
    ],
)
def test_tools_refuse_in_one_line(name: str, arguments: list[str]) -> None:
    done = tool(name, *arguments)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert done.stderr.startswith("error: ")


def test_report_and_determinism(tmp_path: Path) -> None:
    chinese, code = texts(200)[:100], texts(200)[100:]
    first = write_jsonl(tmp_path / "zh.jsonl", chinese)
    second = tmp_path / "code.jsonl.gz"
    second.write_bytes(gzip.compress(write_jsonl(tmp_path / "c.jsonl", code).read_bytes() + b"broken\n"))
    inputs = [str(first), str(second)]
    report = train_tokenizer(inputs, 900, tmp_path / "a", show_progress=False)
    train_tokenizer(inputs, 900, tmp_path / "b", show_progress=False)
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()
    }
    model = SentencePieceTokenizer(tmp_path / "a")
    assert model.vocab_size == 900
    for line, documents in zip(report, (chinese, code), strict=True):
        assert line.bytes == sum(len(text.encode()) for text in documents)
        assert line.tokens == sum(len(model.processor.encode(text)) for text in documents)
        assert line.documents == len(documents)
    assert [line.rejected for line in report] == [0, 1]
    written = json.loads((tmp_path / "a" / "tokenizer_report.json").read_text())
    assert written["sha256"] == model.sha256
    assert written["inputs"][1]["bytes_per_token"] == round(report[1].bytes / report[1].tokens, 4)
    assert f"{report[0].bytes_per_token:.3f}" in compression_table(report)


def test_samples_of_a_large_input(corpus: Path, tmp_path: Path) -> None:
    size = sum(len(text.encode()) for text in texts())
    report = train_tokenizer([str(corpus)], 800, tmp_path / "a", max_sample_bytes=size // 3, show_progress=False)
    assert 0.15 * size < report[0].bytes < 0.5 * size


@pytest.mark.parametrize(
    ("size", "message"),
    [(100, "hold no text"), (261, "hold no text"), (200_000, "give a smaller one or more text")],
)
def test_size_out_of_reach(corpus: Path, tmp_path: Path, size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_tokenizer([str(corpus)], size, tmp_path / "out", show_progress=False)
    assert list(tmp_path.iterdir()) == []


def test_no_text_and_output_in_the_way(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="1 empty_text"):
        train_tokenizer([str(tmp_path / "empty.jsonl")], 500, tmp_path / "out", show_progress=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="exists already"):
        train_tokenizer([str(corpus)], 500, tmp_path / "full", show_progress=False)


def test_small_vocabulary_for_many_characters(corpus: Path, tmp_path: Path) -> None:
    train_tokenizer([str(corpus)], 400, tmp_path / "out", show_progress=False)
    model = SentencePieceTokenizer(tmp_path / "out")
    assert model.vocab_size == 400
    assert all(model.decode(model.encode(text)) == text for text in texts(40))
