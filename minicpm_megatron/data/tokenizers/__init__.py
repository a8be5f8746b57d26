"""Tokenizers: text as ids and back. Each file here is one kind, and has a `TOKENIZER`; other packages may add more.

The kind is recognised from the folder: each has a file of its own, whose SHA-256 is the identity of a tokenizer in
tokens, checkpoints and retrieval sets.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from minicpm_megatron import registry
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.checksum import file_sha256

_LARGEST = 256 << 20
_MAKE_ONE = "make one with minicpm train-tokenizer, or give a folder with tokenizer.json"


class Tokenizer(ABC):
    """One tokenizer. A subclass is a kind: it reads `file` in `__init__` and implements the abstract members.

    The names of control tokens (<s>, <|eot_id|>) in a text are ordinary characters: no text can end a document.

    Args:
        path: a folder with `file`, or the file itself.

    Attributes:
        file: name of the file that a folder of this kind has.
        companions: names of other files that belong to the tokenizer; they leave with an export where they are there.
        path: `file` itself.
        content: its bytes.
        sha256: of its bytes.

    Raises:
        UserError: there is no such file, or it is no tokenizer of this kind.
    """

    file: ClassVar[str]
    companions: ClassVar[tuple[str, ...]] = ()

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.path = path / self.file if path.is_dir() else path
        if not self.path.is_file():
            raise UserError("no such tokenizer", where=str(self.path), fix=_MAKE_ONE)
        if self.path.stat().st_size > _LARGEST:
            raise UserError(f"larger than {_LARGEST >> 20} MiB", where=str(self.path), fix="check the path")
        self.content = self.path.read_bytes()
        self.sha256 = hashlib.sha256(self.content).hexdigest()

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        """Whether the folder is of this kind."""
        return (folder / cls.file).is_file()

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    @abstractmethod
    def bos_id(self) -> int:
        """Id put before a text, -1 for none."""

    @property
    @abstractmethod
    def eos_id(self) -> int:
        """Id that ends a document, -1 for none."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Ids of each text, without `bos_id` and `eos_id`."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control tokens give nothing."""

    @property
    @abstractmethod
    def token_bytes(self) -> NDArray[np.int64]:
        """[vocab_size] UTF-8 bytes of text that each token stands for; 0 for a control token."""

    @property
    def first_token_bytes(self) -> NDArray[np.int64]:
        """[vocab_size] the same at the beginning of a document, where a kind may put a mark that is no text."""
        return self.token_bytes

    def encode(self, text: str) -> list[int]:
        """Ids of one text, as `encode_batch` gives them."""
        return [int(index) for index in self.encode_batch([text])[0]]

    def as_tokenizer_json(self) -> dict[str, Any] | None:
        """The same tokenizer as content of a tokenizer.json, which other programs read; None where there is none.

        An export of a model has it beside the files of this kind.
        """
        return None


def encode_in_parts(
    texts: Sequence[str],
    size: int,
    parts: Callable[[str], Iterable[str] | None],
    encode: Callable[[list[str]], list[NDArray[np.int32]]],
) -> list[NDArray[np.int32]]:
    """Ids of each text: texts of up to `size` characters are encoded together, each longer one part by part.

    Args:
        parts: cuts a long text into parts whose ids, one after another, are those of the whole; None: it cannot be cut.
        encode: ids of each of some texts. It gets one part at a time, because a library needs memory in proportion to
            what it is given at once.
    """
    results: list[NDArray[np.int32] | None] = []
    whole: list[str] = []
    for text in texts:
        cut = parts(text) if len(text) > size else None
        if cut is None:
            results.append(None)
            whole.append(text)
        else:
            results.append(np.concatenate([encode([part])[0] for part in cut]))
    encoded = iter(encode(whole))
    return [next(encoded) if ids is None else ids for ids in results]


def as_tokenizer(entry: Any) -> type[Tokenizer]:
    """The kind that a file here or another package has registered.

    Raises:
        TypeError: it is no subclass of `Tokenizer`, lacks a member, or has no plain file name.
    """
    if not (isinstance(entry, type) and issubclass(entry, Tokenizer)):
        raise TypeError(f"a tokenizer must be a subclass of Tokenizer, not {entry!r}")
    if missing := sorted(entry.__abstractmethods__):
        raise TypeError(f"a tokenizer needs {', '.join(missing)}")
    names = (getattr(entry, "file", None), *entry.companions)
    if any(not isinstance(name, str) or not name or Path(name).name != name for name in names):
        raise TypeError(f"{names} are no names of files")
    return entry


def tokenizer_kind(path: str | Path) -> type[Tokenizer]:
    """The kind of a tokenizer folder or file; a file that is called like none is a sentencepiece model.

    A package cannot take over a folder that is of a kind of ours: it is asked after them.

    Raises:
        UserError: no kind recognises it.
    """
    path, broken = Path(path), list[str]()
    kind: type[Tokenizer]
    for kind in registry.TOKENIZERS.loadable(broken):
        if kind.is_in(path) if path.is_dir() else path.is_file() and path.name == kind.file:
            return kind
    default: type[Tokenizer] = registry.TOKENIZERS.get("sentencepiece")
    if path.is_file():
        return default
    where = path / default.file if path.is_dir() else path
    raise UserError("no such tokenizer", where=str(where), fix="; ".join((_MAKE_ONE, *broken)))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a folder, or of one file, whatever its kind.

    Raises:
        UserError: there is none, or it is damaged.
    """
    return tokenizer_kind(path)(path)


def tokenizer_sha256(path: str | Path) -> str:
    """SHA-256 that identifies a tokenizer, without loading it.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    kind = tokenizer_kind(path)
    return file_sha256(path / kind.file if path.is_dir() else path)


def has_tokenizer(folder: Path, sha256: str | None = None) -> bool:
    """Whether a folder has a tokenizer of any kind, of this identity where one is given."""
    files = (folder / kind.file for kind in registry.TOKENIZERS.loadable([]))
    return any(file.is_file() and sha256 in (None, file_sha256(file)) for file in files)
