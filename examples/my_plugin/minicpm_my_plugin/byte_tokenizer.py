"""A tokenizer is a subclass of `Tokenizer`. In this one a token is a byte, so that no text has to be looked at first.

A folder is of this kind when it has a bytes.json: {"begin": "<s>", "end": "</s>"}, the names of the two other tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicpm_megatron.data.tokenizers import Tokenizer
from minicpm_megatron.errors import UserError

BYTES = 256


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are bytes of UTF-8, 256 begins and 257 ends a document."""

    file = "bytes.json"
    vocab_size = BYTES + 2
    bos_id, eos_id = BYTES, BYTES + 1
    token_bytes = np.array([1] * BYTES + [0, 0])  # [vocab_size]

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        try:
            content = json.loads(self.content)
            self.names = (str(content["begin"]), str(content["end"]))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"no begin and end: {error}", where=str(self.path)) from None

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Each text's bytes. A text of any length takes five times its memory."""
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text, U+FFFD where bytes are none."""
        return bytes(index for index in ids if index < BYTES).decode(errors="replace")

    def as_tokenizer_json(self) -> dict[str, Any]:
        """The same for `tokenizers`: byte-level BPE without a merge, so that exports run in other programs."""
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        begin, end = self.names
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
        return {
            "version": "1.0",
            "added_tokens": [
                {"id": self.bos_id, "content": begin, **flags},
                {"id": self.eos_id, "content": end, **flags},
            ],
            "pre_tokenizer": level,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {begin: {"id": begin, "ids": [self.bos_id], "tokens": [begin]}},
            },
            "decoder": level,
            "model": {"type": "BPE", "vocab": _characters() | {begin: self.bos_id, end: self.eos_id}, "merges": []},
        }


def _characters() -> dict[str, int]:
    """The character that stands for each byte in byte-level BPE: its own where that can be seen."""
    seen = [*range(33, 127), *range(161, 173), *range(174, BYTES)]
    hidden = [byte for byte in range(BYTES) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(BYTES + place): byte for place, byte in enumerate(hidden)}
