"""Places at which the host waits for the device, counted."""

from __future__ import annotations

import sys
from collections import Counter
from types import FrameType
from typing import Any

import torch

from tests.fake_cuda import values

PROJECT = "minicpm_megatron"
LIBRARIES = ("deepspeed/", "megatron/")

found: Counter[str] = Counter()
"""How often at each place, as `KIND PLACE`; kinds: item (a number is read), to cpu, to cuda (a copy that the host waits
for), synchronize."""


def note(kind: str) -> None:
    """Count one where the project's code is now."""
    found[f"{kind} {_place()}"] += 1


def take() -> dict[str, int]:
    """Those since the last call, by place."""
    taken = dict(sorted(found.items()))
    found.clear()
    return taken


def _place() -> str:
    """`file:function` of the project's innermost frame, and of the library's that it called where that one waits."""
    frame: FrameType | None = sys._getframe(1)
    library = ""
    while frame is not None:
        before, slash, inside = frame.f_code.co_filename.rpartition(f"/{PROJECT}/")
        if slash:
            return " > ".join(filter(None, (f"{inside}:{frame.f_code.co_name}", library)))
        before, slash, inside = frame.f_code.co_filename.rpartition("/site-packages/")
        if slash and not library and inside.startswith(LIBRARIES):
            library = f"{inside}:{frame.f_code.co_name}"
        frame = frame.f_back
    return library or "elsewhere"


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

    fake_impls.op_implementations_dict[torch.ops.aten._local_scalar_dense.default] = read
    ours = {"numpy": read_all, "tolist": lambda tensor: read_all(tensor).tolist()}
    for name, function in ours.items():
        setattr(fake_tensor.FakeTensor, name, function)
