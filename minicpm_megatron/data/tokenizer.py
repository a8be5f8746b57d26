"""The tokenizer of a run: a sentencepiece model, and exact encoding of documents of any length.

sentencepiece needs memory in proportion to the text it is given at once. Its pieces hold the word boundary mark
only at their beginning, so a text may be cut before a space that follows something else without changing one id:
the mark that sentencepiece puts before the second part stands for the space that was cut away. `Tokenizer` checks
that this holds for the vocabulary at hand and then encodes long documents part by part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.sentencepiece_model import parse_model

MODEL_NAME = "tokenizer.model"
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
"""Ids of <unk>, <s> and </s> in every published MiniCPM tokenizer."""
CHAT_SYMBOLS = ("<用户>", "<AI>")
"""The turns of the published chat form, each one id."""

_MARK = "▁"
_PART_CHARACTERS = 1 << 16


def model_path(path: str | Path) -> Path:
    """The sentencepiece model that `path`, a tokenizer folder or the model itself, stands for.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    file = path / MODEL_NAME if path.is_dir() else path
    if not file.is_file():
        raise UserError("no such tokenizer", where=str(file), fix="make one with tools/train_tokenizer.py")
    return file


def tokenizer_sha256(path: str | Path) -> str:
    """SHA-256 of the sentencepiece model, the identity of a tokenizer (the other files are made from it)."""
    return hashlib.sha256(model_path(path).read_bytes()).hexdigest()


class Tokenizer:
    """A sentencepiece model with MiniCPM's special tokens.

    Args:
        path: a folder with tokenizer.model, or the model itself.

    Raises:
        UserError: the file is missing or is no sentencepiece model.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = model_path(path)
        content = self.path.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            # parsed first: sentencepiece takes an empty file for a model and dies on the first text
            self.description = parse_model(content)
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (RuntimeError, ValueError) as error:
            raise UserError("not a sentencepiece model", where=str(self.path), fix="check the path") from error

    @property
    def vocab_size(self) -> int:
        """Number of pieces; ids are in [0, vocab_size)."""
        return self.processor.get_piece_size()

    @property
    def bos_id(self) -> int:
        """Id put before a text, -1 if the model has none."""
        return self.processor.bos_id()

    @property
    def eos_id(self) -> int:
        """Id that ends a document, -1 if the model has none."""
        return self.processor.eos_id()

    @cached_property
    def can_cut(self) -> bool:
        """Whether cutting before a single space is exact: no piece has the mark after another character."""
        model = self.description
        return (
            model.is_bpe
            and model.identity
            and model.add_dummy_prefix
            and not model.remove_extra_whitespaces
            and not any(_MARK in piece.text.lstrip(_MARK) for piece in model.pieces)
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without <s> and </s>; special tokens' names in the text are ordinary characters."""
        ids: list[int] = self.encode_batch([text])[0].tolist()
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text as int32, the same as sentencepiece gives for the whole of it."""
        results: list[np.ndarray | None] = []
        short: list[str] = []
        for text in texts:
            if len(text) > _PART_CHARACTERS and self.can_cut:
                # lists of ids take ten times an array's memory, so each part is turned into one at once
                parts = (self.processor.encode(part) for part in self._cut(text))
                results.append(np.concatenate([np.array(part, dtype=np.int32) for part in parts]))
            else:
                results.append(None)
                short.append(text)
        encoded = iter(self.processor.encode(short, num_threads=1))
        return [np.array(next(encoded), dtype=np.int32) if ids is None else ids for ids in results]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; <s> and </s> give nothing."""
        return str(self.processor.decode(list(ids)))

    @staticmethod
    def _cut(text: str) -> Iterator[str]:
        start = 0
        while len(text) - start > _PART_CHARACTERS:
            cut = text.find(" ", start + _PART_CHARACTERS)
            # the space must follow something that is no space (nor the mark, which sentencepiece takes for one)
            while cut > 0 and text[cut - 1] in (" ", _MARK):
                cut = text.find(" ", cut + 1)
            # after the cut-away space there must be something for the mark to stand before
            if cut < 0 or cut + 1 >= len(text):
                break
            yield text[start:cut]
            start = cut + 1
        yield text[start:]
