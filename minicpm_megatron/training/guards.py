"""What ends a run early: signals and a launcher that has died; and what ranks tell each other in a step.

Ranks must stop at the same step, so each keeps what it noticed to itself until the exchange that every step makes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from types import FrameType

import torch
import torch.distributed as dist

from minicpm_megatron.parallel import device
from minicpm_megatron.training.launcher import Launcher

# A launcher may pass one Ctrl-C on twice, as SIGINT and then SIGTERM; only the same signal again, later than this
# many seconds, means that the user does not want to wait.
REPEAT_AFTER = 1.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class SignalGuard:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a request to save and stop after the current step.

    The same signal a second time, after a second, aborts at once with its default action. The `deepspeed` command
    does not pass signals on when it is killed itself, so its death counts as SIGTERM, too.

    Args:
        launcher: as it was when the command began.
    """

    def __init__(self, launcher: Launcher) -> None:
        self.received: str | None = None
        self._when: dict[int, float] = {}
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._launcher = launcher
        launcher.take_over()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._when.get(number, now) > REPEAT_AFTER:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._when.setdefault(number, now)
        self.received = self.received or signal.Signals(number).name

    def requested(self) -> bool:
        """Whether this rank was asked to stop."""
        if self.received is None and self._launcher.is_dead():
            self.received = "the launcher's death"
        return self.received is not None

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Verdict:
    """What all ranks together know after the forward passes of a step.

    Attributes:
        loss: mean over the tokens of the global batch, in nats.
        stop: some rank was asked to stop.
        saved: on every rank the asynchronous save has ended.
    """

    loss: float
    stop: bool
    saved: bool


def exchange(loss: torch.Tensor, *, stop: bool, saved: bool) -> Verdict:
    """Average `loss` over all ranks and learn what they noticed; one small collective a step."""
    noticed = torch.tensor([float(stop), float(saved)], device=loss.device)
    shared = torch.cat([loss.detach().float().view(1), noticed])
    dist.all_reduce(shared)
    total, stops, saves = shared.tolist()
    size = dist.get_world_size()
    return Verdict(loss=total / size, stop=stops > 0, saved=saves == size)


def agree(value: float) -> float:
    """Rank 0's `value`, so that no rounding makes ranks decide differently."""
    shared = torch.tensor(value, dtype=torch.float64, device=device.device())
    dist.broadcast(shared, 0)
    return float(shared)


def announce(text: str) -> None:
    """Say on standard error, from rank 0, why a run ends."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)
