"""The processes that started this rank: `deepspeed`, torchrun and others like it. No rank goes on long after them.

Neither passes its own death on. Left to themselves, ranks of a killed `deepspeed` train on as orphans. Ranks of a
torchrun that was killed while they met wait for its store until the timeout of their process group.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import psutil

EXIT_ORPHANED = 1
_POLL = 1.0  # seconds between two looks
_WORDS = ("deepspeed", "torchrun", "torch.distributed")  # one of them is in a launcher's command line
# names that a launcher gives to its ranks' environment: whatever calls torch's elastic agent (torchrun, accelerate, a
# script), deepspeed's launcher of a node
_MARKS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")


class Launcher:
    """This rank's launcher, looked up when the command begins; that is early enough to notice its death at any time.

    Until `take_over` a thread ends the process once the launcher has died: nothing has been trained that would be lost.
    Then it is the caller's to ask `is_dead` and to save first. A process without RANK has no launcher.
    """

    def __init__(self) -> None:
        parents = psutil.Process().parents() if "RANK" in os.environ else []
        marked = any(name in os.environ for name in _MARKS)
        self._died_before = marked and _is_orphan(parents, os.getsid(0), _has_lost_its_leader(os.getpgrp()))
        self._processes = _launchers(parents, marked and not self._died_before)
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
        if self._taken_over.is_set():  # before this thread had its first look
            return
        try:
            if os.environ.get("RANK") == "0":
                with contextlib.suppress(OSError):  # the launcher may have been the reader of this rank's output
                    print("error: the launcher died before the first step", file=sys.stderr, flush=True)
        finally:
            os._exit(EXIT_ORPHANED)


def _launchers(parents: Sequence[psutil.Process], marked: bool) -> list[psutil.Process]:
    """Those of the processes above this one, nearest first, that belong to its launcher.

    The nearest that is one by its command line, where a script may stand between, and what started that: deepspeed's
    launcher of a node and its front end. Of a rank that is `marked` its parent, too, which may have any name.
    """
    nearest = next((place for place, process in enumerate(parents) if _is_launcher(process)), len(parents))
    found = [process for process in parents[nearest : nearest + 2] if _is_launcher(process)]
    return [*parents[: 1 if marked and nearest else 0], *found]


def _is_orphan(parents: Sequence[psutil.Process], session: int, leaderless: bool) -> bool:
    """Whether the launcher of a marked rank has died, so that the rank has become a child of init.

    Where it cannot be told the answer is no, because a run that has nothing wrong must go on. Init may be the launcher
    itself, in a container. A rank in a container of its own is a child of that container's init from the start, and in
    its session or in one from outside. So is an orphan of a launcher that the container's init has started; there it
    tells that the leader of its process group has gone, which deepspeed's ranks share with their launcher. An orphan
    whose group is init's own, too, is not told apart: neither deepspeed 0.19 nor torch 2.13 gives the launcher's pid to
    its ranks, and PR_SET_PDEATHSIG is silent on a parent that died before. The watchdog ends that one.

    Args:
        parents: of the rank, nearest first.
        session: of the rank.
        leaderless: the leader of the rank's process group has gone.
    """
    if not parents or (session in (0, 1) and not leaderless) or any(_is_launcher(process) for process in parents):
        return False
    try:
        is_init = parents[0].pid == 1 or parents[0].name() == "systemd"  # a user's, which adopts orphans as well
        return is_init and not Path(parents[0].cmdline()[0]).name.startswith("python")
    except (psutil.Error, IndexError):
        return False


def _has_lost_its_leader(group: int) -> bool:
    """Whether no process has the number of a process group; groups of init, and 0 of outside a container, have one."""
    return group > 1 and not psutil.pid_exists(group)


def _is_launcher(process: psutil.Process) -> bool:
    try:
        words = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return any(word in words for word in _WORDS)


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
