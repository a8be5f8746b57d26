"""Where DeepSpeed 0.19 must be told otherwise before it starts, with the reason."""

from __future__ import annotations

import logging
from typing import Any

import deepspeed
from deepspeed.runtime import bf16_optimizer

from minicpm_megatron.engine.zero import flat_gradients


def prepare() -> None:
    """Lay the patches; called before DeepSpeed's communication is set up, safe to call more than once."""
    # On CPU DeepSpeed compiles a shared-memory all-reduce that only its inference uses: half a minute for every new
    # environment, and a build that is killed leaves a lock on which all later runs wait for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # it tells every rank's story at INFO; warnings stay
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19.8's optimizer for bf16 at ZeRO 1 prints the memory while it starts, 16 lines whatever the level
    # (force=True in bf16_optimizer.py); what a JSON's memory_breakdown asks the engine for stays
    bf16_optimizer.see_memory_usage = _say_nothing
    flat_gradients.prepare()


def _say_nothing(message: str, force: bool = False, **keywords: Any) -> None:
    """In place of DeepSpeed's `see_memory_usage`."""
