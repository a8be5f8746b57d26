"""The published formats. To add one: a file here with a `FORMAT`, and its line in `FORMATS`."""

from __future__ import annotations

from minicpm_megatron.convert.format import Format
from minicpm_megatron.convert.formats import granite, granitemoe, llama, minicpm, mixtral

FORMATS: dict[str, Format] = {
    f.name: f for f in (minicpm.FORMAT, llama.FORMAT, granite.FORMAT, mixtral.FORMAT, granitemoe.FORMAT)
}
