"""The processes that started this rank: `deepspeed` or torchrun. A rank must not go on long after they have died.

Neither passes its own death on. Left to themselves, ranks of a killed `deepspeed` train on as orphans. Ranks of a
torchrun that was killed while they met wait for its store until the timeout of their process group.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading

import psutil

EXIT_ORPHANED = 1
_POLL = 1.0  # seconds between two looks
_WORDS = ("deepspeed", "torchrun", "torch.distributed")  # one of them is in a launcher's command line
# names that a launcher gives to its ranks' environment: torchrun, deepspeed's launcher of a node
_MARKS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")


class Launcher:
    """This rank's launcher, looked up when the command begins; that is early enough to notice its death at any time.

    Until `take_over` a thread ends the process once the launcher has died: nothing has been trained that would be lost.
    Then it is the caller's to ask `is_dead` and to save first. A process without RANK has no launcher.
    """

    def __init__(self) -> None:
        started = "RANK" in os.environ
        self._processes = _ancestors(2) if started else []
        self._died_before = started and _is_orphan()
        self._taken_over = threading.Event()
        if self._processes or self._died_before:
            threading.Thread(target=self._watch, name="launcher", daemon=True).start()

    def is_dead(self) -> bool:
        """Whether one of the launcher's processes has gone."""
        return self._died_before or any(not _alive(process) for process in self._processes)

    def take_over(self) -> None:
        """Leave the decision what to do about a death to the caller."""
        self._taken_over.set()

    def _watch(self) -> None:
        while not self.is_dead():
            if self._taken_over.wait(_POLL):
                return
        try:
            if os.environ.get("RANK") == "0":
                with contextlib.suppress(OSError):  # the launcher may have been the reader of this rank's output
                    print("error: the launcher died before the first step", file=sys.stderr, flush=True)
        finally:
            os._exit(EXIT_ORPHANED)


def _ancestors(generations: int) -> list[psutil.Process]:
    """The processes above this one that belong to a launcher: deepspeed's per-node launcher and its front end."""
    found = []
    for process in psutil.Process().parents()[:generations]:
        if not _is_launcher(process):
            break
        found.append(process)
    return found


def _is_orphan() -> bool:
    """Whether a launcher has started this process, and no process above it is one any more."""
    marked = any(name in os.environ for name in _MARKS)
    return marked and not any(_is_launcher(process) for process in psutil.Process().parents())


def _is_launcher(process: psutil.Process) -> bool:
    try:
        words = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return any(word in words for word in _WORDS)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
