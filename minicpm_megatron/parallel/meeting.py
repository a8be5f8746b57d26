"""A name that the ranks of one start share, where the store they meet on is full of what dead ranks have left there.

Torch's elastic agent hosts the store and keeps it when it starts its ranks again, on every kind of rendezvous. Its
count of restarts names no start: each node's agent counts the failures of its own ranks.
"""

from __future__ import annotations

import datetime
import os
import time
import uuid

import torch.distributed as dist

_POLL = 0.01  # seconds


def outlives_ranks() -> bool:
    """Whether the store belongs to an elastic agent, and not to rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def name_of_start(store: dist.Store, rank: int, size: int, timeout: datetime.timedelta) -> str:
    """A name that rank 0 makes up, on every rank of this start and on no rank of another one.

    Each other rank asks with a word of its own, and takes the answer to that word alone. Rank 0 answers whatever is
    asked until all have said that they know the name, since what it finds at first may be a dead rank's question.

    Args:
        timeout: how long rank 0 waits for the others; these wait for it as long as the store's own timeout.

    Raises:
        torch.distributed.DistStoreError: not all ranks came in time.
    """
    if rank > 0:
        word = uuid.uuid4().hex
        store.set(f"question {rank}", word)
        name = str(store.get(f"answer {word}").decode())
        store.set(f"{name} is known to {rank}", "")
        return name
    name, answered = uuid.uuid4().hex, {0: ""}
    deadline = time.monotonic() + timeout.total_seconds()
    while missing := [other for other in range(1, size) if not store.check([f"{name} is known to {other}"])]:
        for other in missing:
            if store.check([f"question {other}"]):
                word = store.get(f"question {other}").decode()
                if word != answered.get(other):
                    store.set(f"answer {word}", name)
                    answered[other] = word
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"ranks {', '.join(map(str, missing))} did not come within {timeout}")
        time.sleep(_POLL)
    return name
