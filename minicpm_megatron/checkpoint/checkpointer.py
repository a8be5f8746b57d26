"""The checkpoints of one run: find, open, save, retain; every call is collective over the run's ranks."""

from __future__ import annotations

import copy
import itertools
import logging
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch.distributed as dist
from torch import Tensor

from minicpm_megatron.checkpoint.background import BackgroundSave, Staging
from minicpm_megatron.checkpoint.find import clean_leftovers, newest_valid
from minicpm_megatron.checkpoint.names import step_folder
from minicpm_megatron.checkpoint.publish import SMALL_FILES, publish
from minicpm_megatron.checkpoint.ranks import Ranks
from minicpm_megatron.checkpoint.retention import retain
from minicpm_megatron.checkpoint.run_state import RunState
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage import lock
from minicpm_megatron.storage.manifest import MANIFEST, Unreadable, problems
from minicpm_megatron.storage.sharded import CheckpointReader, Fragment

log = logging.getLogger(__name__)

MEETING = 16  # blocks of 4 MiB that a rank verifies between two exchanges


@dataclass(frozen=True)
class LoadedCheckpoint:
    """An opened checkpoint.

    Attributes:
        reader: its tensors.
        manifest: everything in manifest.json.
        state: where the run stood.
    """

    reader: CheckpointReader
    manifest: dict[str, Any]
    state: RunState

    def rank_tensors(self, rank: int) -> dict[str, Tensor]:
        """What that rank saved for itself."""
        return self.reader.rank_tensors(rank)


class Checkpointer:
    """The folder checkpoints/ of a run.

    Args:
        directory: the folder; made on the first save.
        keep_last, keep_every, keep_steps: retention, see `retention.retain`.
        on_corrupt: what to do when the newest checkpoint is damaged.
        group: process group of the run, used by nothing else while a save is under way; None: one process.
        on_phase: called with the name of every phase of a save that is waited for (`publish.PHASES`).
        on_progress: called with a path again and again while this rank or another one verifies checksums.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_last: int = 2,
        keep_every: int | None = None,
        keep_steps: Collection[int] = (),
        on_corrupt: Literal["stop", "previous"] = "stop",
        group: dist.ProcessGroup | None = None,
        on_phase: Callable[[str], None] = lambda phase: None,
        on_progress: Callable[[Path], None] = lambda path: None,
    ) -> None:
        self.directory = Path(directory)
        self.keep_last, self.keep_every, self.keep_steps = keep_last, keep_every, frozenset(keep_steps)
        self.on_corrupt = on_corrupt
        self.ranks = Ranks(group)
        self.on_phase, self.on_progress = on_phase, on_progress
        self._lock: BinaryIO | None = None
        self._staging = Staging()
        self._under_way: BackgroundSave | None = None

    def preflight(self, bytes_needed: int) -> None:
        """Find out before the first step whether a save can succeed, and keep other runs out of the folder.

        Raises:
            UserError: the folder cannot be written, has less room than one checkpoint needs, or another run that is
                still going (or still saving after its launcher was killed) writes there.
        """
        self.on_first(lambda: self._preflight(bytes_needed))

    def _preflight(self, bytes_needed: int) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory) as probe:
                probe.write(b"x")
            if self._lock is None:  # closing any file of a lock drops it: a second one would undo the first
                self._lock = lock.hold(self.directory)
            clean_leftovers(self.directory)  # of a killed save: their room is ours
        except OSError as error:
            raise UserError(
                f"cannot write checkpoints: {error.strerror}",
                where=str(self.directory),
                fix="choose a writable run.directory",
            ) from None
        free = shutil.disk_usage(self.directory).free
        if free < bytes_needed + SMALL_FILES:
            raise UserError(
                f"a checkpoint needs {bytes_needed + SMALL_FILES:,} bytes and {free:,} are free",
                where=str(self.directory),
                fix="free some space or choose another run.directory",
            )

    def find_latest(self) -> Path | None:
        """The newest valid checkpoint, or None where there never was one; see `find.newest_valid`.

        The ranks share the reading.
        """

        def find() -> str | None:
            if self.ranks.rank > 0:
                while (folder := self.ranks.from_first(None)) is not None:
                    self._verify_part(Path(folder))
                return None
            try:
                clean_leftovers(self.directory)
                found = newest_valid(self.directory, self.on_corrupt, self._verify)
                return None if found is None else str(found)
            finally:
                self.ranks.from_first(None)

        found = self.ranks.from_first(self.on_all(find))
        return None if found is None else Path(found)

    def _verify(self, folder: Path) -> list[str]:
        """`manifest.problems`, asked by rank 0 while the others wait for a folder."""
        self.ranks.from_first(str(folder))
        return self._verify_part(folder)

    def _verify_part(self, folder: Path) -> list[str]:
        found: list[str] = []
        fault = None
        calls = itertools.count(1)

        def on_progress(path: Path) -> None:
            self.on_progress(path)
            if next(calls) % MEETING == 0:
                self.ranks.gather(None)

        try:
            found = problems(folder, self.ranks.rank, self.ranks.size, on_progress)
        except Unreadable as error:
            fault = [error.what, error.where, error.fix]
        # a rank that is done hears of each piece that others have read: it waits for none for longer than a piece takes
        while None in (outcomes := self.ranks.gather({"found": found, "fault": fault})):
            self.on_progress(folder)
        for what, where, fix in (outcome["fault"] for outcome in outcomes if outcome["fault"]):
            if self.ranks.rank == 0:  # which decides what it means
                raise Unreadable(what, where=where, fix=fix)
        return list(dict.fromkeys(line for outcome in outcomes for line in outcome["found"]))

    def open(self, folder: Path, *, verified: bool = True) -> LoadedCheckpoint:
        """Open a checkpoint on every rank.

        Args:
            verified: it comes from `find_latest`, which has read it in full; False: check it now.

        Raises:
            UserError: a file is damaged, or the manifest or the run's state in it malformed.
        """
        if not verified:
            found = self.on_all(lambda: self._verify_part(folder))
            if found:
                raise UserError(f"the checkpoint is damaged: {found[0]}", where=str(folder), fix="choose another one")
        loaded: LoadedCheckpoint = self.on_all(lambda: _load(folder))
        return loaded

    def save(
        self,
        step: int,
        fragments: Iterable[Fragment],
        *,
        rank_tensors: dict[str, Tensor],
        state: RunState,
        facts: dict[str, Any],
        wait: bool = True,
    ) -> Path:
        """Publish a checkpoint and remove those that need not be kept; see `publish.publish`.

        A save that is still under way is waited for first, so that there are never two.

        Args:
            wait: return when the checkpoint is published, holding one tensor at a time in host memory. False: copy
                what this rank saves into host memory, and let a thread publish it; `wait` raises what happens there.
        """
        self.wait()
        content, facts = copy.deepcopy((state.to_json(), facts))  # the run goes on with lists that are in there

        def publish_and_retain(pieces: Iterable[Fragment], on_phase: Callable[[str], None]) -> Path:
            folder = publish(
                self.directory,
                step,
                pieces,
                rank_tensors=rank_tensors,
                state=content,
                facts=facts,
                ranks=self.ranks,
                on_phase=on_phase,
            )
            if self.ranks.rank == 0:
                self._retain(step)
            return folder

        if wait:
            return publish_and_retain(fragments, self.on_phase)
        staged = self._staging.copy(fragments)
        self._under_way = BackgroundSave(lambda: publish_and_retain(staged, lambda phase: None))
        return step_folder(self.directory, step)

    def _retain(self, step: int) -> None:
        try:
            retain(
                self.directory,
                keep_last=self.keep_last,
                keep_every=self.keep_every,
                keep_steps=self.keep_steps,
                verified=step,
            )
        except OSError as error:
            log.warning("old checkpoints in %s could not be removed: %s", self.directory, error.strerror)

    def settled(self) -> bool:
        """Whether this rank's part of an asynchronous save has ended and `wait` has not been called since."""
        return self._under_way is not None and self._under_way.done()

    def wait(self) -> None:
        """Wait for the save that is under way, if there is one.

        Raises:
            UserError: it failed; on every rank, with the same words.
        """
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.wait()

    def on_first(self, action: Callable[[], Any]) -> Any:
        """Do `action` on rank 0 and have its (JSON) value, or its UserError, on every rank."""
        return self.ranks.from_first(self.on_all(lambda: action() if self.ranks.rank == 0 else None))

    def on_all(self, action: Callable[[], Any]) -> Any:
        """Do `action` on every rank; where one raises a UserError, or the disk fails it, every rank raises that.

        A rank that left alone would let the others wait in their next collective.
        """
        self.wait()  # its collectives are the thread's as long as there is one
        value, fault = None, None
        try:
            value = action()
        except UserError as error:
            fault = [error.what, error.where, error.fix]
        except OSError as error:
            where = str(error.filename or self.directory)
            fault = [error.strerror or str(error), where, "check the disk and its permissions"]
        for what, where, fix in filter(None, self.ranks.gather(fault)):
            raise UserError(what, where=where, fix=fix)
        return value


def _load(folder: Path) -> LoadedCheckpoint:
    reader = CheckpointReader(folder)
    return LoadedCheckpoint(reader, reader.manifest, RunState.of(reader.manifest, str(folder / MANIFEST)))
