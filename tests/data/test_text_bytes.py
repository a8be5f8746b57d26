"""Bytes of the tokens of a sample against sentencepiece's own alignment of pieces and text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from minicpm_megatron.data.dataset import TokenDataset
from minicpm_megatron.data.text_bytes import TextBytes
from minicpm_megatron.data.tokenizers.sentencepiece import SentencePieceTokenizer
from tests.data.conftest import texts, write_jsonl
from tests.data.preprocess_helpers import run
from tests.data.surfaces import surface_bytes

# what a tokenizer can meet: spaces at the borders, characters that only bytes can hold, symbols of the chat form
DOCUMENTS = [*texts(6), " a  b ", "𓀀 𓁐 end", "<用户>question<AI>answer", "x", "naïve café", "中文 text 中文"]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("length", [5, 64])
def test_the_bytes_of_a_sample_are_those_of_its_labels(
    length: int, bos: bool, tokenizer_dir: Path, tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", DOCUMENTS)
    metadata = run([corpus], tokenizer_dir, tmp_path / "tokens", prepend_bos=bos)
    dataset = TokenDataset(tmp_path / "tokens", length, seed=3)
    # where each document stands in the epoch's stream is told by the order of the ids themselves
    by_ids = {}
    for text in DOCUMENTS:
        ids = [*([1] if bos else []), *tokenizer.encode(text), 2]
        by_ids[tuple(ids)] = surface_bytes(tokenizer, [text])[0 if bos else 1 :]
    epoch, order = dataset._epoch(0)
    stream = [
        dataset._read(document, 0, int(dataset._sizes[document]))
        for document in epoch.order.take(np.arange(len(DOCUMENTS)))
    ]
    expected = np.concatenate([by_ids[tuple(document.tolist())] for document in stream])
    assert expected.sum() == metadata.text_bytes == sum(len(text.encode()) for text in DOCUMENTS)
    counter = TextBytes(tokenizer)
    for sample in range(dataset.samples_per_epoch):
        first = order(sample) * length
        assert counter.of_labels(dataset, metadata, sample) == expected[first + 1 : first + 1 + length].sum()
