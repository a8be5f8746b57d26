"""The checkpoints of one run: find, open, save, retain; every call is collective over the run's ranks."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

from minicpm_megatron.checkpoint.find import clean_leftovers, newest_valid
from minicpm_megatron.checkpoint.publish import SMALL_FILES, publish
from minicpm_megatron.checkpoint.ranks import Ranks
from minicpm_megatron.checkpoint.retention import retain
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.manifest import problems
from minicpm_megatron.storage.sharded import CheckpointReader, Fragment


@dataclass(frozen=True)
class LoadedCheckpoint:
    """An opened checkpoint.

    Attributes:
        reader: its tensors.
        manifest: everything in manifest.json.
    """

    reader: CheckpointReader
    manifest: dict[str, Any]

    @property
    def state(self) -> dict[str, Any]:
        """Where the run stood (JSON values)."""
        return self.manifest["state"]

    def rank_tensors(self, rank: int) -> dict[str, Tensor]:
        """What that rank saved for itself."""
        return self.reader.rank_tensors(rank)


class Checkpointer:
    """The folder checkpoints/ of a run.

    Args:
        directory: the folder; made on the first save.
        keep_last, keep_every: retention, see `retention.retain`.
        on_corrupt: what to do when the newest checkpoint is damaged.
        group: process group of the run; None: one process.
        on_phase: called with the name of every phase of a save (`publish.PHASES`).
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_last: int = 2,
        keep_every: int | None = None,
        on_corrupt: Literal["stop", "previous"] = "stop",
        group: dist.ProcessGroup | None = None,
        on_phase: Callable[[str], None] = lambda phase: None,
    ) -> None:
        self.directory = Path(directory)
        self.keep_last, self.keep_every, self.on_corrupt = keep_last, keep_every, on_corrupt
        self.ranks = Ranks(group)
        self.on_phase = on_phase

    def preflight(self, bytes_needed: int) -> None:
        """Find out before the first step whether a save can succeed.

        Raises:
            UserError: the folder cannot be written, or has less room than one checkpoint needs.
        """
        self._on_first(lambda: self._preflight(bytes_needed))

    def _preflight(self, bytes_needed: int) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory) as probe:
                probe.write(b"x")
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
        """The newest valid checkpoint, or None where there never was one; see `find.newest_valid`."""

        def find() -> str | None:
            clean_leftovers(self.directory)
            found = newest_valid(self.directory, self.on_corrupt)
            return None if found is None else str(found)

        found = self._on_first(find)
        return None if found is None else Path(found)

    def open(self, folder: Path, *, verified: bool = True) -> LoadedCheckpoint:
        """Open a checkpoint on every rank.

        Args:
            verified: it comes from `find_latest`, which has read it in full; False: check it now.

        Raises:
            UserError: a file is damaged, or the manifest malformed.
        """
        if not verified:
            found = self._on_first(lambda: problems(folder))
            if found:
                raise UserError(f"the checkpoint is damaged: {found[0]}", where=str(folder), fix="choose another one")
        reader = CheckpointReader(folder)
        return LoadedCheckpoint(reader, reader.manifest)

    def save(
        self,
        step: int,
        fragments: Iterable[Fragment],
        *,
        rank_tensors: dict[str, Tensor],
        state: dict[str, Any],
        facts: dict[str, Any],
    ) -> Path:
        """Publish a checkpoint and remove those that need not be kept; see `publish.publish`."""
        folder = publish(
            self.directory,
            step,
            fragments,
            rank_tensors=rank_tensors,
            state=state,
            facts=facts,
            ranks=self.ranks,
            on_phase=self.on_phase,
        )
        if self.ranks.rank == 0:
            retain(self.directory, keep_last=self.keep_last, keep_every=self.keep_every, verified=step)
        return folder

    def _on_first(self, action: Callable[[], Any]) -> Any:
        """Do `action` on rank 0 and have its value, or its UserError, on every rank."""
        outcome: dict[str, Any] = {"value": None, "error": None}
        if self.ranks.rank == 0:
            try:
                outcome["value"] = action()
            except UserError as error:
                outcome["error"] = [error.what, error.where, error.fix]
        outcome = self.ranks.from_first(outcome)
        if outcome["error"] is not None:
            what, where, fix = outcome["error"]
            raise UserError(what, where=where, fix=fix)
        return outcome["value"]
