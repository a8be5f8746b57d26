"""A small tokenizer and corpora that the tests of this folder share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from minicpm_megatron.data import sample_corpus
from minicpm_megatron.data.tokenizer_training import train_tokenizer
from minicpm_megatron.data.tokenizers.sentencepiece import SentencePieceTokenizer

VOCAB_SIZE = 1500


def texts(count: int = 400) -> list[str]:
    """Real documents: Chinese classics and the source of a module of ours in pieces."""
    chinese = [text.text for _, text in zip(range(count // 2), sample_corpus.chinese(), strict=False)]
    source = Path(sample_corpus.__file__).read_text(encoding="utf-8")
    step = max(1, len(source) // (count // 2))
    pieces = [source[first : first + 2 * step] for first in range(0, len(source), step)]
    return chinese + [piece for piece in pieces if piece.strip()]  # the last may be the end of a line


def write_jsonl(path: Path, documents: list[str]) -> Path:
    """One {"text"} a line."""
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents), "utf-8")
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "sample.jsonl", texts())


@pytest.fixture(scope="session")
def tokenizer_dir(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tokenizer") / "tok"
    train_tokenizer([str(corpus)], VOCAB_SIZE, output, show_progress=False)
    return output


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(tokenizer_dir)


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Cut inputs into units of that many bytes, so that a small corpus has many."""

    def cut(size: int) -> None:
        monkeypatch.setattr("minicpm_megatron.data.corpus_files.SEGMENT_BYTES", size)
        monkeypatch.setattr("minicpm_megatron.data.tokenize_units.SEGMENT_BYTES", size)

    return cut
