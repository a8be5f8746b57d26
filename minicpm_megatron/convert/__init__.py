"""What leaves and enters: our checkpoints to and from published formats.

Works without Megatron, DeepSpeed or a process group. Formats are data (`formats/`); `convert` is the whole operation.
The names below are loaded on first use, so that a list of the formats costs no import of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minicpm_megatron.convert.formats import FORMATS
    from minicpm_megatron.convert.operation import Conversion, convert, open_source, recognise
    from minicpm_megatron.convert.source import Source, TensorSource
    from minicpm_megatron.convert.target_names import targets

_HOMES = {
    "FORMATS": "formats",
    "Conversion": "operation",
    "Source": "source",
    "TensorSource": "source",
    "convert": "operation",
    "open_source": "operation",
    "recognise": "operation",
    "targets": "target_names",
}
__all__ = ["FORMATS", "Conversion", "Source", "TensorSource", "convert", "open_source", "recognise", "targets"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
