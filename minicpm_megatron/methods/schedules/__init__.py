"""The schedules of ours, one file each: every file here is read, and registers the schedule it contains.

The paper's (section 4 and appendix B.1 of arXiv 2404.06395) can be imported from here.
"""

from __future__ import annotations

import importlib
import pkgutil

from minicpm_megatron.methods.decay_shapes import FLOOR, DecaySettings
from minicpm_megatron.methods.schedule import Schedule, branch_schedule, build_schedule
from minicpm_megatron.methods.schedules.constant import Constant
from minicpm_megatron.methods.schedules.cosine import Cosine
from minicpm_megatron.methods.schedules.cosine_loop import CosineLoop
from minicpm_megatron.methods.schedules.wsd import WSD

__all__ = [
    "FLOOR",
    "WSD",
    "Constant",
    "Cosine",
    "CosineLoop",
    "DecaySettings",
    "Schedule",
    "branch_schedule",
    "build_schedule",
]

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
