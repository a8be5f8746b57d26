"""Hugging Face's tokenizer.json, by its own library: Llama 3, Qwen, published MiniCPM and most others.

tokenizer.json has every id; which of them begin and end a text is in tokenizer_config.json. A folder that has
tokenizer.model, too, is a sentencepiece tokenizer with the same ids.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicpm_megatron.data import tokenizer_cuts
from minicpm_megatron.data.tokenizer_cuts import MARK, steps
from minicpm_megatron.data.tokenizers import Tokenizer, encode_in_parts
from minicpm_megatron.errors import UserError, shorten

_ROLES = ("tokenizer_config.json", "special_tokens_map.json")
_LARGEST_ROLES = 16 << 20
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
# a decoder made of these gives a text back
_DECODERS = {"ByteLevel", "ByteFallback", "Replace", "Fuse", "Strip", "Metaspace"}


class JsonTokenizer(Tokenizer):
    """A tokenizer of the library `tokenizers`, with the library's own ids.

    Names of special tokens in a text are text, as `encode_special_tokens` of the library has it. Added tokens that are
    not special (<tool_call>) are tokens wherever they stand, as user-defined symbols of sentencepiece are.

    Args:
        path: a folder with tokenizer.json, or the file itself.

    Raises:
        UserError: the file is missing, no tokenizer, gives no text back, or reads special tokens in texts.
    """

    file = "tokenizer.json"
    companions = (*_ROLES, "added_tokens.json", "chat_template.jinja")

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.backend = _backend(self.content, self.path)
        self._pieces: dict[str, int] = self.backend.get_vocab(with_added_tokens=True)
        self._check_ids()
        # complete and checked, unlike the file
        self._description: dict[str, Any] = json.loads(self.backend.to_str())
        self._special = {
            index: token.content for index, token in self.backend.get_added_tokens_decoder().items() if token.special
        }
        self._check()
        self._roles = _roles(self.path.parent)

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        """Whether tokenizer.json is there, alone."""
        return super().is_in(folder) and not (folder / "tokenizer.model").is_file()

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens among them."""
        return 1 + max(self._pieces.values(), default=-1)

    @property
    def bos_id(self) -> int:
        """Of the bos_token that tokenizer_config.json names, -1 where it names none."""
        return self._id_of("bos_token")

    @property
    def eos_id(self) -> int:
        """Of the eos_token that tokenizer_config.json names, -1 where it names none."""
        return self._id_of("eos_token")

    @cached_property
    def cuts(self) -> tokenizer_cuts.Cuts | None:
        """Where a long text may be cut; None: it is encoded whole, in 140 to 200 times its memory."""
        return tokenizer_cuts.cuts(self._description, self.backend.get_vocab(with_added_tokens=False))

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Ids of each text as int32, the same as the library gives for the whole of it."""
        size = tokenizer_cuts.PART_CHARACTERS
        return encode_in_parts(
            texts, size, lambda text: self.cuts.parts(text, size) if self.cuts else None, self._encode
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens give nothing."""
        return str(self.backend.decode(list(ids), skip_special_tokens=True))

    @cached_property
    def token_bytes(self) -> NDArray[np.int64]:
        """[vocab_size] bytes of each token's text: its own, 1 for a byte piece, 0 for a special token.

        Over a whole document these, with `first_token_bytes` for its first token, are exactly its bytes, unless the
        tokenizer changes text before it splits it (Qwen's NFC), or begins with its mark a text that has a space there.
        """
        kinds = {step["type"] for step in steps(self._description["decoder"])}
        added = {token["id"] for token in self._description["added_tokens"]}
        counted = np.zeros(self.vocab_size, dtype=np.int64)
        for piece, index in self._pieces.items():
            if index in self._special or piece == self._description["model"].get("unk_token"):
                continue
            if "ByteLevel" in kinds and index not in added:
                counted[index] = len(piece)  # a character stands for a byte
            elif "ByteFallback" in kinds and _BYTE_PIECE.fullmatch(piece):
                counted[index] = 1
            else:
                counted[index] = len(piece.replace(MARK, " ").encode())
        return counted

    @cached_property
    def first_token_bytes(self) -> NDArray[np.int64]:
        """[vocab_size] one less for a token that begins with the mark or space that is put before a document."""
        levels = (step for step in steps(self._description["pre_tokenizer"]) if step["type"] == "ByteLevel")
        spaced = any(step["add_prefix_space"] for step in levels)
        begin = "Ġ" if spaced else tokenizer_cuts.mark_before_text(self._description)
        fewer = self.token_bytes.copy()
        for piece, index in self._pieces.items():
            fewer[index] -= bool(begin) and piece.startswith(str(begin)) and fewer[index] > 0
        return fewer

    def _encode(self, texts: list[str]) -> list[NDArray[np.int32]]:
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _id_of(self, role: str) -> int:
        name = self._roles.get(role)
        if name is None:
            return -1
        index = self.backend.token_to_id(name)
        if index is None:
            raise UserError(
                f"{role} {shorten(name)} is no token of {self.file}", where=str(self.path.parent / _ROLES[0])
            )
        return int(index)

    def _check_ids(self) -> None:
        """Refuse ids with large holes, before the library's `to_str` counts up to the largest (tokenizers 0.23.3: one
        piece with id 4e9 takes all memory there is).

        Raises:
            UserError: there are such, or no ids.
        """
        where, fix = str(self.path), "choose another tokenizer"
        if not self._pieces:
            raise UserError("no pieces", where=where, fix=fix)
        if self.vocab_size > 2 * len(self._pieces) + 1024:
            raise UserError(f"id {self.vocab_size - 1} for {len(self._pieces)} pieces", where=where, fix=fix)

    def _check(self) -> None:
        """Refuse what cannot be trained on.

        Raises:
            UserError: a decoder that gives no text back, or special tokens read in texts.
        """
        where, fix = str(self.path), "choose another tokenizer"
        decoders = [step["type"] for step in steps(self._description["decoder"])]
        if not decoders or not _DECODERS.issuperset(decoders):
            raise UserError(f"a decoder {decoders} gives no text back", where=where, fix=fix)
        unknown = self._description["model"].get("unk_token")
        for index, name in self._special.items():
            texts = [name, f"a{name}b", f" {name} "]
            if name != unknown and any(index in ids for ids in self._encode(texts)):
                raise UserError(f"{shorten(name)} in a text is read as the special token", where=where, fix=fix)


def _backend(content: bytes, path: Path) -> Any:
    """The library's object for a tokenizer.json.

    Raises:
        UserError: the content is none.
    """
    # workers are processes already; the library's threads would only warn of that
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_str(content.decode())
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"not a tokenizer: {' '.join(str(error).split())}", where=str(path), fix="check the path"
        ) from None
    # settings of one application: each would change the ids of some texts
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None
    backend.encode_special_tokens = True
    return backend


def _roles(folder: Path) -> dict[str, str]:
    """bos_token and eos_token of the first of the files that names them.

    Raises:
        UserError: a file is malformed.
    """
    found: dict[str, str] = {}
    for path in (folder / name for name in _ROLES):
        if not path.is_file():
            continue
        try:
            if path.stat().st_size > _LARGEST_ROLES:
                raise ValueError(f"larger than {_LARGEST_ROLES >> 20} MiB")
            content = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"not readable as JSON: {error}", where=str(path)) from None
        if not isinstance(content, dict):
            raise UserError("not a JSON object", where=str(path))
        for role in ("bos_token", "eos_token"):
            name = content.get(role)
            name = name.get("content") if isinstance(name, dict) else name
            if isinstance(name, str):
                found.setdefault(role, name)
    return found


TOKENIZER = JsonTokenizer
