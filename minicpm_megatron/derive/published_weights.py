"""The Hugging Face folder that --init-from takes in place of RUN@STEP."""

from __future__ import annotations

from pathlib import Path

from minicpm_megatron.convert import FORMATS, open_source, recognise
from minicpm_megatron.convert.shards import SourceShards
from minicpm_megatron.errors import UserError
from minicpm_megatron.training.start import Published


def open_published_weights(folder: Path) -> Published:
    """The model in a folder of a published format, its weights, and what the folder says about texts.

    Raises:
        UserError: it is no such folder, or not what the format says it is.
    """
    found = recognise(folder)
    if found not in FORMATS:
        raise UserError(
            f"a folder in the format {found}, which has optimizer state beside its weights",
            where=str(folder),
            fix="give RUN@STEP; minicpm convert --to megatron makes a checkpoint of a torch_dist one",
        )
    source = open_source(folder)
    return Published(source.model, SourceShards(source), source.text.state())
