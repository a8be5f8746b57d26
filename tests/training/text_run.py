"""A recipe of a small run on real text whose tokenizer and tokens lie in the run's folder, as the quickstart's do."""

from __future__ import annotations

from pathlib import Path

from minicpm_megatron.data.tokenizer_training import train_tokenizer
from tests.data.conftest import texts, write_jsonl
from tests.data.preprocess_helpers import run as tokenize
from tests.training import nano

VOCABULARY = 700


def write_text_recipe(folder: Path, run: str) -> Path:
    """The recipe; `folder`/runs/`run` has tokenizer/ and data/text.*, and no checkpoint yet."""
    home = folder / "runs" / run
    home.mkdir(parents=True)
    corpus = write_jsonl(folder / "corpus.jsonl", texts(60))
    train_tokenizer([str(corpus)], VOCABULARY, home / "tokenizer", show_progress=False)
    tokenize([corpus], home / "tokenizer", home / "data" / "text")
    text = str(home / "data" / "text")
    return nano.write_recipe(
        folder,
        model=nano.MODEL | {"vocab_size": VOCABULARY},
        data={"train": [{"prefix": text}], "validation": {"text": text}, "tokenizer": str(home / "tokenizer")},
        evaluation={"interval": 4, "batches": 1},
        checkpoint={"interval": 4},
    )
