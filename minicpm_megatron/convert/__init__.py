"""What leaves and enters: our checkpoints to and from published formats.

Works without Megatron, DeepSpeed or a process group. Formats are data (`formats/`); `convert` is the whole operation.
"""

from __future__ import annotations

from minicpm_megatron.convert.formats import FORMATS
from minicpm_megatron.convert.operation import TARGETS, Conversion, convert, open_source, recognise
from minicpm_megatron.convert.source import Source, TensorSource

__all__ = ["FORMATS", "TARGETS", "Conversion", "Source", "TensorSource", "convert", "open_source", "recognise"]
