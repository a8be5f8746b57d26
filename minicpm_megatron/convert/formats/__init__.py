"""Published formats: each file here is one, called as the file is, and has a `FORMAT`. Other packages may add more."""

from __future__ import annotations

from collections.abc import Mapping

from minicpm_megatron import registry
from minicpm_megatron.convert.format import Format

FORMATS: Mapping[str, Format] = registry.Entries(registry.FORMATS)
