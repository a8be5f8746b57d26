"""Which layout to train a recipe with: memory, communication and step time by formula, before a GPU is rented.

Predictions, not measurements. `cluster` states what the hardware can do, `communication` what must be sent, `step` how
long a step takes, `search` which layouts are legal and fastest, `report` prints them.
"""

from __future__ import annotations

from minicpm_megatron.planning.cluster import GPUS, Cluster
from minicpm_megatron.planning.search import Plan, find_layouts
from minicpm_megatron.planning.step import Prediction, predict

__all__ = ["GPUS", "Cluster", "Plan", "Prediction", "find_layouts", "predict"]
