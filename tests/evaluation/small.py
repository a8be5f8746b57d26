"""A small model with a tokenizer and held-out tokens of its own."""

from __future__ import annotations

from pathlib import Path

from minicpm_megatron.data.preprocess import preprocess
from minicpm_megatron.data.tokenizer_training import train_tokenizer
from minicpm_megatron.storage.sharded import write_single
from tests.convert.conftest import random_tensors, small_model
from tests.data.conftest import texts, write_jsonl

PIECES = 600


def write_model_and_tokens(folder: Path) -> Path:
    """tokenizer, tokens (.bin and .idx) and model below `folder`, which is returned."""
    corpus = write_jsonl(folder / "corpus.jsonl", texts(100))
    train_tokenizer([str(corpus)], PIECES, folder / "tokenizer", show_progress=False)
    preprocess([str(corpus)], folder / "tokenizer", folder / "tokens", workers=1, show_progress=False)
    model = small_model(vocab_size=PIECES, num_layers=1)
    write_single(folder / "model", random_tensors(model).items(), model.model_dump(mode="json"), {"step": 0})
    return folder
