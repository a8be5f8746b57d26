"""Places at which the host waits for the device, counted."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import minicpm_megatron
from tests.fake_cuda import values

PROJECT = f"{Path(minicpm_megatron.__file__).parent}{os.sep}"
INSTALLED = f"{Path(torch.__file__).parents[1]}{os.sep}"
LIBRARIES = tuple(f"{INSTALLED}{name}{os.sep}" for name in ("deepspeed", "megatron"))

found: Counter[str] = Counter()
"""Count host waits by place, as `KIND PLACE`. Kinds: item (numbers are read), shape (the size of a result depends on
numbers), copy to cpu, copy to cuda (unless asynchronous), synchronize."""


def note(kind: str) -> None:
    """Count one where the project's code is now."""
    found[f"{kind} {_place()}"] += 1


def take() -> dict[str, int]:
    """Return the waits since the last call, by place."""
    taken = dict(sorted(found.items()))
    found.clear()
    return taken


def _place() -> str:
    """`file:function` of the project's innermost frame, and of the library's that it called where that one waits."""
    library = ""
    for path, function in stack():
        if path.startswith(PROJECT):
            return " > ".join(filter(None, (f"{path.removeprefix(PROJECT)}:{function}", library)))
        if not library and path.startswith(LIBRARIES):
            library = f"{path.removeprefix(INSTALLED)}:{function}"
    return library or "elsewhere"


def stack() -> Iterator[tuple[str, str]]:
    """(file, function) of all frames but this one, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_code.co_name
        frame = frame.f_back


def watch() -> None:
    """Count numbers read from fake CUDA tensors, and answer with those of `values`."""
    from torch._subclasses import fake_impls, fake_tensor

    def read(mode: Any, function: Any, *arguments: Any, **keywords: Any) -> Any:
        tensor = arguments[0] if arguments else keywords["self"]
        if tensor.is_cuda:
            note("item")
        return values.number(tensor)

    def read_all(tensor: Any) -> Any:
        """FakeTensor's own `tolist` reads number by number, where torch copies all of them at once."""
        if tensor.is_cuda:
            note("item")
        return values.array(tensor)

    def nonzero(mode: Any, function: Any, tensor: Any) -> Any:
        """Its shape depends on numbers, for which torch waits."""
        note("shape")
        with mode:
            return torch.empty(values.documents, tensor.dim(), dtype=torch.int64, device=tensor.device)

    fake_impls.op_implementations_dict[torch.ops.aten._local_scalar_dense.default] = read
    fake_impls.op_implementations_dict[torch.ops.aten.nonzero.default] = nonzero
    ours = {"numpy": read_all, "tolist": lambda tensor: read_all(tensor).tolist()}
    for name, function in ours.items():
        setattr(fake_tensor.FakeTensor, name, function)
