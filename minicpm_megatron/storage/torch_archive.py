"""Files of torch.save read as data: plain values and single numbers, without unpickling anything."""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.pickle_as_data import PERSISTENT, Description, read_pickle_as_data

_LARGEST = 256 * 2**20
_PICKLE = re.compile(r"([^/]+)/data\.pkl")
# zipfile has no error of its own for most of what can be wrong with an archive
_DAMAGED = (
    *(zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, struct.error),
    *(ValueError, KeyError, IndexError, OverflowError),
)
_NUMBERS = {"FloatStorage": "<f", "DoubleStorage": "<d", "LongStorage": "<q", "IntStorage": "<i"}


class TorchArchive:
    """A file of torch.save.

    Attributes:
        value: what was saved; see `read_pickle_as_data`.

    Raises:
        UserError: it is damaged, or names something that is not `allowed`.
    """

    def __init__(self, file: BinaryIO, allowed: Callable[[str], bool], *, where: str) -> None:
        try:
            self._zip = zipfile.ZipFile(file)
            found = [match for name in self._zip.namelist() if (match := _PICKLE.fullmatch(name))]
            self._root = found[0][1]
            content = self._read(found[0][0])
        except _DAMAGED as error:
            raise UserError(f"not a whole file of torch.save: {error}", where=where) from None
        self.value = read_pickle_as_data(content, allowed, where=where)

    def number(self, value: Any) -> float | None:
        """A plain number, or the one in a tensor of one element; None where it is something else."""
        try:
            if isinstance(value, int | float):
                return float(value)
            # torch._utils._rebuild_tensor_v2(storage, offset, size, stride, ...); the storage is outside of the pickle
            if not value.made_by.startswith("torch._utils._rebuild_tensor") or value.arguments[1] != 0:
                return None
            storage: Description = value.arguments[0]
            _, kind, key, _, count = storage.arguments[0]
            if storage.made_by != PERSISTENT or count != 1:
                return None
            layout = _NUMBERS[kind.text.removeprefix("torch.")]
            return float(struct.unpack(layout, self._read(f"{self._root}/data/{key}"))[0])
        except (AttributeError, TypeError, *_DAMAGED):
            return None

    def _read(self, name: str) -> bytes:
        info = self._zip.getinfo(name)
        if info.file_size > _LARGEST or info.compress_type != zipfile.ZIP_STORED:  # torch stores, uncompressed
            raise ValueError(f"{name} is too large or compressed")
        return self._zip.read(info)
