"""Where DeepSpeed 0.19 must be told otherwise before it starts, with the reason."""

from __future__ import annotations

import logging

import deepspeed

from minicpm_megatron.engine import zero1


def prepare() -> None:
    """Lay the patches; called before DeepSpeed's communication is set up, safe to call more than once."""
    # On CPU DeepSpeed compiles a shared-memory all-reduce that only its inference uses: half a minute for every new
    # environment, and a build that is killed leaves a lock on which all later runs wait for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # it tells every rank's story at INFO; warnings stay
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    zero1.prepare()
