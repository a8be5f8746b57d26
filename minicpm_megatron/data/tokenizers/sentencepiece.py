"""sentencepiece models, and exact encoding of documents of any length.

sentencepiece needs memory in proportion to the text it is given at once. Its pieces hold the word boundary mark
only at their beginning, so a text may be cut before a space that follows something else without changing one id:
the mark that sentencepiece puts before the second part stands for the space that was cut away. The tokenizer checks
that this holds for the vocabulary at hand and then encodes long documents part by part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from minicpm_megatron.data.tokenizers import Tokenizer, encode_in_parts
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.sentencepiece_model import Piece, PieceType, parse_model

MODEL_NAME = "tokenizer.model"
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
"""Ids of <unk>, <s> and </s> in every published MiniCPM tokenizer."""
CHAT_SYMBOLS = ("<用户>", "<AI>")
"""The turns of the published chat form, each one id."""

_MARK = "▁"
_PART_CHARACTERS = 1 << 16


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model with MiniCPM's special tokens.

    Args:
        path: a folder with tokenizer.model, or the model itself.

    Raises:
        UserError: the file is missing or is no sentencepiece model.
    """

    file = MODEL_NAME
    # made from the model by minicpm train-tokenizer, with the same ids
    companions = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        try:
            # parsed first: sentencepiece takes an empty file for a model and dies on the first text
            self.description = parse_model(self.content)
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=self.content)
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

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Ids of each text as int32, the same as sentencepiece gives for the whole of it."""
        return encode_in_parts(
            texts, _PART_CHARACTERS, lambda text: self._cut(text) if self.can_cut else None, self._encode
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; <s> and </s> give nothing."""
        return str(self.processor.decode(list(ids)))

    @cached_property
    def token_bytes(self) -> NDArray[np.int64]:
        """[vocab_size] a piece's UTF-8 bytes, with a space for each mark; 1 for a byte piece; 0 for <s>, </s>, <unk>.

        Over a whole document these, with `first_token_bytes` for its first token, are exactly its bytes, unless the
        model changes text before it splits it, or the text has the mark itself as a character.
        """
        return np.array([_bytes_of(piece) for piece in self.description.pieces], dtype=np.int64)

    @cached_property
    def first_token_bytes(self) -> NDArray[np.int64]:
        """[vocab_size] one less for a piece that begins with the mark, which sentencepiece puts before a document."""
        added = self.description.add_dummy_prefix
        less = np.array([added and p.text.startswith(_MARK) for p in self.description.pieces], dtype=np.int64)
        return self.token_bytes - less

    def _encode(self, texts: list[str]) -> list[NDArray[np.int32]]:
        # lists of ids take ten times an array's memory, so each is turned into one at once
        return [np.array(ids, dtype=np.int32) for ids in self.processor.encode(texts, num_threads=1)]

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


def _bytes_of(piece: Piece) -> int:
    if piece.type is PieceType.BYTE:
        return 1
    if piece.type in (PieceType.CONTROL, PieceType.UNKNOWN):
        return 0
    return len(piece.text.replace(_MARK, " ").encode())


TOKENIZER = SentencePieceTokenizer
