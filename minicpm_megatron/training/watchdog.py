"""Ends a run whose ranks wait for each other, and says which rank the others wait for, and in what.

A collective that hangs says nothing by itself: every rank but one is inside it. So a thread of each rank looks at how
long ago the rank last made progress. When that is too long it writes down what the rank is doing into the run's folder,
where all ranks can read it, and the ranks that are in no collective, or do not answer, are named.

Under gloo a rank waits inside the collective. Under NCCL the call returns at once, and the rank waits later, wherever
it first needs a result: there every rank is in no collective. So each rank also writes down how many collectives it has
launched in each of its process groups. The ranks that have launched fewer than others of the same group are those that
the others wait for. Torch does not count messages between two ranks (pipeline stages).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed import distributed_c10d

from minicpm_megatron.checkpoint import background
from minicpm_megatron.storage.atomic import write_json

# modules in which a rank waits for others: torch's collectives, and the meeting before them
COLLECTIVES = (
    os.path.join("torch", "distributed", "distributed_c10d.py"),
    os.path.join("torch", "distributed", "rendezvous.py"),
    os.path.join("minicpm_megatron", "parallel", "meeting.py"),
)
EXIT_HANG = 1
_LONGEST_LOOK = 5.0  # seconds between two looks at the clock
_HANGS = "hang-rank-*.json"


class Watchdog:
    """Watches this rank from a thread of its own; use as a context manager, before anything that waits for other ranks.

    Args:
        folder: shared by all ranks of the run; made if need be.
        rank, size: of the job.
        timeout: seconds without a `tick` after which the run is ended with status 1.
    """

    def __init__(self, folder: Path, *, rank: int, size: int, timeout: float) -> None:
        self.folder, self.rank, self.size, self.timeout = folder, rank, size, timeout
        self._doing, self._last = "starting", time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        # of a start before this one; of this one there is none before `timeout`
        for path in self.folder.glob(_HANGS):
            path.unlink(missing_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def tick(self, doing: str) -> None:
        """Progress was made, and this is what comes next."""
        self._doing, self._last = doing, time.monotonic()

    def _file(self, rank: int) -> Path:
        return self.folder / f"hang-rank-{rank}.json"

    def _watch(self) -> None:
        while not self._over.wait(min(_LONGEST_LOOK, self.timeout / 4)):
            if time.monotonic() - self._last > self.timeout:
                self._end()
            # others have waited too long for this rank, which makes progress (it still loads, for one): it answers and
            # leaves the end to them, since what was written may be a rank's of an earlier start that was stopped
            elif not self._file(self.rank).exists() and any(self.folder.glob(_HANGS)):
                with contextlib.suppress(OSError):
                    self._write_whereabouts(ends=False)

    def _write_whereabouts(self, *, ends: bool) -> None:
        entry = {"doing": self._doing, "host": socket.gethostname(), "ends": ends, **_whereabouts()}
        write_json(self._file(self.rank), entry)

    def _end(self) -> None:
        """Write down what this rank does, wait for the others to do so, and leave; the lowest that leaves speaks."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_whereabouts(ends=True)
            # the others noticed their last progress at most one look earlier or later
            deadline = time.monotonic() + 2 * min(_LONGEST_LOOK, self.timeout / 4) + 1
            while time.monotonic() < deadline and any(not self._file(rank).exists() for rank in range(self.size)):
                time.sleep(0.1)
            found = {rank: _read(self._file(rank)) for rank in range(self.size)}
            if self.rank == min(rank for rank, entry in found.items() if entry and entry.get("ends")):
                print(report(found, self.timeout), file=sys.stderr, flush=True)
            else:
                time.sleep(1.0)  # a launcher ends everyone as soon as one leaves
        finally:
            os._exit(EXIT_HANG)


def report(found: dict[int, dict[str, Any]], timeout: float) -> str:
    """What the ranks wrote down, in words: first those that the others seem to wait for.

    Args:
        found: rank -> "doing", "host", "collective" (None outside of one), "place" and "launched" (name of a process
            group -> its description and the number of collectives launched); empty where it did not answer.
        timeout: seconds that passed.
    """
    silent = [rank for rank, entry in found.items() if not entry]
    outside = [rank for rank, entry in found.items() if entry and entry["collective"] is None]
    behind = _behind(found)
    culprits = [rank for rank in outside if rank in behind] or outside
    done = [rank for rank in outside if rank not in culprits]
    waiting: dict[tuple[str, str], list[int]] = {}
    for rank, entry in found.items():
        if entry and entry["collective"] is not None:
            waiting.setdefault((entry["collective"], entry["doing"]), []).append(rank)
    lines = [f"error: no progress for {timeout:g} s; the run is ended, start it again to go on"]
    lines += [f"  rank {rank} does not answer: its process is stopped or gone" for rank in silent]
    lines += [
        f"  rank {rank} on {found[rank]['host']} is in no collective: {found[rank]['doing']}, in {found[rank]['place']}"
        + behind.get(rank, "")
        for rank in culprits
    ]
    lines += [
        f"  rank {rank} waits for its device, and has launched what the others have: {found[rank]['doing']}, in"
        f" {found[rank]['place']}"
        for rank in done
    ]
    for (collective, doing), ranks in waiting.items():
        subject = f"ranks {', '.join(map(str, ranks))} wait" if len(ranks) > 1 else f"rank {ranks[0]} waits"
        lines.append(f"  {subject} in {collective}: {doing}")
    if not silent and not outside:
        lines.append("  every rank waits in a collective: they are not in the same one, or the network is gone")
    return "\n".join(lines)


def _behind(found: dict[int, dict[str, Any]]) -> dict[int, str]:
    """Rank -> words on the first process group in which it has launched fewer collectives than another rank."""
    most: dict[str, int] = {}
    for entry in found.values():
        for name, (_, count) in entry.get("launched", {}).items():
            most[name] = max(count, most.get(name, count))
    behind: dict[int, str] = {}
    for rank, entry in found.items():
        for name, (description, count) in entry.get("launched", {}).items():
            if count < most[name]:
                said = f"; of {description} it has launched {count:,} collectives where another rank has launched"
                behind.setdefault(rank, f"{said} {most[name]:,}")
    return behind


def _launched() -> dict[str, list[Any]]:
    """Name of each process group of this rank -> [description, number of collectives launched in it].

    Torch 2.13 has no public list of its groups. The names agree between ranks, since all ranks make all groups.
    """
    groups: Any = distributed_c10d._world.pg_names
    launched = {}
    for group, name in list(groups.items()):
        with contextlib.suppress(RuntimeError):  # a group that is still being made has no number
            launched[name] = [group.group_desc, group._get_sequence_number_for_group()]
    return launched


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return {}


def _whereabouts() -> dict[str, Any]:
    """The collective that any thread of this process but the saving one is in, where its main thread is, and how many
    collectives it has launched."""
    collective = None
    saving = {thread.ident for thread in threading.enumerate() if thread.name == background.THREAD}
    for frame in (frame for thread, frame in sys._current_frames().items() if thread not in saving):
        names = [each.f_code.co_name for each in _outwards(frame) if each.f_code.co_filename.endswith(COLLECTIVES)]
        if names:
            collective = names[-1]
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return {
        "collective": collective,
        "place": f"{frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})",
        "launched": _launched(),
    }


def _outwards(frame: FrameType | None) -> list[FrameType]:
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames
