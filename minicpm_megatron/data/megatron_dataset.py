"""Megatron-Core's reader of .bin/.idx, loaded when it is needed: it brings torch and a second of start-up."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any


def open_indexed_dataset(prefix: str | Path) -> Any:
    """`megatron.core.datasets.indexed_dataset.IndexedDataset` over PREFIX, memory-mapped.

    What it returns are views of the map, which it closes when it is deleted: keep it, or copy, for as long as they
    are used.
    """
    with warnings.catch_warnings():
        # megatron.core 0.19 warns of each optional GPU library that is missing when it is imported, and of an unknown
        # rank when IndexedDataset logs; neither has to do with reading tokens
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        return IndexedDataset(str(prefix))
