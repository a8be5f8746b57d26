"""Weights in a file of torch.save (pytorch_model.bin): checked as data, then memory-mapped by torch's own safe reader.

A pickle runs whatever it names. So its names are read first, as text, and a file that names anything but tensors is
refused before torch sees it; torch then reads it with `weights_only=True`, which has a list of its own.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import torch

from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.torch_archive import TorchArchive

# what the state dictionary of a module is pickled as
_ALLOWED = re.compile(
    r"collections\.OrderedDict|torch\._utils\._rebuild_(tensor_v2|parameter)"
    r"|torch\.(\w+Storage|storage\.(UntypedStorage|TypedStorage)|float32|float16|bfloat16)"
)
_ZIP = b"PK\x03\x04"
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_SAVE_AGAIN = "python -c 'import sys, torch; f = sys.argv[1]; torch.save(torch.load(f, weights_only=True), f)' {path}"


class PickledWeights:
    """The tensors of one file, in memory only where they are read.

    Raises:
        UserError: the file is missing or damaged, is of a torch before 1.6, contains something other than a flat
            dictionary of tensors, or names anything that could run. Nothing in it is executed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with open(path, "rb") as file:
                if file.read(len(_ZIP)) != _ZIP:
                    raise UserError(
                        "not a file of torch.save since torch 1.6, which alone can be memory-mapped",
                        where=str(path),
                        fix=f"if it is older, save it again: {_SAVE_AGAIN.format(path=shlex.quote(str(path)))}",
                    )
                TorchArchive(file, lambda name: _ALLOWED.fullmatch(name) is not None, where=str(path))
            value = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except FileNotFoundError:
            raise UserError("missing", where=str(path), fix="download it again") from None
        except UserError:
            raise
        except Exception as error:  # torch has a dozen kinds for what can be wrong with a file
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"not a whole file of torch.save: {first[:200]}", where=str(path)) from None
        self._tensors = self._checked(value)

    def _checked(self, value: Any) -> dict[str, torch.Tensor]:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise UserError("not a dictionary of tensors by name", where=str(self._path))
        for name, tensor in value.items():
            if not isinstance(tensor, torch.Tensor):
                raise UserError(
                    f"{name!r} is no tensor but a {type(tensor).__name__}",
                    where=str(self._path),
                    fix="save the model's state_dict() alone",
                )
            # strides of 0 make a tensor of any size out of a few bytes
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise UserError(f"tensor {name} is larger than what is stored of it", where=str(self._path))
        return value

    def names(self) -> list[str]:
        """All tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of `name`."""
        return tuple(self._tensors[name].shape)

    def stored_type(self, name: str) -> str:
        """Stored type of `name`, as safetensors calls it where weights come in it."""
        dtype = self._tensors[name].dtype
        return _DTYPE_NAMES.get(dtype, str(dtype))

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor in its stored type."""
        return self._tensors[name].detach().contiguous()

    def rows(self, name: str, start: int, end: int) -> torch.Tensor:
        """Rows of a matrix."""
        return self._tensors[name].detach()[start:end]
