"""The sample corpus is real, reproducible, without repetition, and split by document."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minicpm_megatron.data import sample_corpus
from minicpm_megatron.data.sample_corpus import build_sample_corpus, prose_paragraphs
from minicpm_megatron.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def few_packages() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_corpus, "DOCSTRING_PACKAGES", ("networkx", "not_installed"))
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("built") / "corpus"
    build_sample_corpus(output, 2.5)
    return output


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_files_and_manifest_agree(built: Path) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    total = 0
    for language in sample_corpus.LANGUAGES:
        for name in (language, f"{language}.valid"):
            records = read(built / f"{name}.jsonl")
            size = sum(len(record["text"].encode()) for record in records)
            assert manifest["files"][name] == {"documents": len(records), "bytes": size}
            assert records
            total += size
    assert 2.0e6 < total <= 2.5e6
    assert sum(row["bytes"] for row in manifest["sources"]) == total
    assert all(row["licence"] for row in manifest["sources"])
    assert all(row["source"] in (built / "README.md").read_text() for row in manifest["sources"])


def test_nothing_twice_and_held_out_is_held_out(built: Path) -> None:
    every = [record["text"] for path in built.glob("*.jsonl") for record in read(path)]
    assert len(set(every)) == len(every)
    paragraphs = [part for path in built.glob("en*.jsonl") for r in read(path) for part in r["text"].split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)


def test_languages_are_what_they_say(built: Path) -> None:
    def share(text: str) -> float:
        return sum("\u4e00" <= character <= "\u9fff" for character in text) / len(text)

    assert all(share(record["text"]) > 0.5 for record in read(built / "zh.jsonl"))
    assert all(share(record["text"]) == 0 for record in read(built / "en.jsonl"))
    for record in read(built / "code.jsonl"):
        compile(record["text"], "module.py", "exec", dont_inherit=True)


def test_same_packages_give_the_same_bytes(built: Path, tmp_path: Path) -> None:
    build_sample_corpus(tmp_path / "again", 2.5)
    assert {p.name: p.read_bytes() for p in built.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()
    }


def test_prose_is_told_from_the_rest() -> None:
    text = """This paragraph is running English, and it goes on for more than ten words in
    two lines.

    >>> print(this(is, an, example)) and it has a good many words in it too.

    x : array_like, optional, a parameter with a description of more than ten words = 3.

    Too short a sentence."""
    assert prose_paragraphs(text) == [
        "This paragraph is running English, and it goes on for more than ten words in two lines."
    ]


def test_output_in_the_way_and_absurd_size(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="exists already"):
        build_sample_corpus(tmp_path, 2)
    with pytest.raises(UserError, match="--size-mb"):
        build_sample_corpus(tmp_path / "new", 0)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_shipped_chinese_is_named_in_full() -> None:
    readme = (Path(sample_corpus.__file__).parent / "sample_texts" / "README.md").read_text("utf-8")
    texts = list(sample_corpus.chinese())
    assert f"{len(texts):,} documents" in readme
    assert all(source in readme for source in {text.source for text in texts})
