"""A subclass in the place of one of DeepSpeed's optimizers while DeepSpeed starts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from deepspeed.runtime import engine


@contextlib.contextmanager
def standing_in(builds: type, ours: type) -> Iterator[None]:
    """Have `deepspeed.initialize` build `ours`, a subclass of `builds`, wherever DeepSpeed's engine names `builds`.

    DeepSpeed 0.19.8 takes no class of optimizer: `_configure_zero_optimizer` and `_configure_fp16_optimizer` of its
    engine construct what a global of their module is bound to. Delete this once `deepspeed.initialize` takes one.
    """
    assert issubclass(ours, builds)
    setattr(engine, builds.__name__, ours)
    try:
        yield
    finally:
        setattr(engine, builds.__name__, builds)
