"""The observers of a run on one rank: built, called in order, and left out where they fail."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minicpm_megatron.checkpoint.ranks import Ranks
from minicpm_megatron.errors import UserError
from minicpm_megatron.parallel import device
from minicpm_megatron.recipe import Recipe
from minicpm_megatron.registry import OBSERVERS
from minicpm_megatron.training.observer import Evaluation, Measurement, Observer, RunInfo, StepRecord

_MEETING = 0.5  # seconds between two looks of the ranks at what rank 0 does with a checkpoint
Factory = Callable[[Recipe], Observer | None]


class Observers:
    """The observers that this rank calls: rank 0 all of them, the others those that are `everywhere`.

    All ranks make the same calls in the same order; those are collective where an observer is `everywhere`.

    Args:
        factories: name -> what makes the observer; the same names on all ranks.
        ranks: of the run, for exchanges while no save is under way.
        on_wait: called again and again while the ranks wait for rank 0's `on_checkpoint`.

    Attributes:
        failure: why an essential observer failed. All ranks stop and save before it is raised: one that left alone, in
            the middle of a step, would let the others wait.
    """

    def __init__(
        self,
        factories: Mapping[str, Factory],
        recipe: Recipe,
        ranks: Ranks,
        *,
        on_wait: Callable[[str], None] = lambda doing: None,
    ) -> None:
        self.failure: UserError | None = None
        self._ranks, self._on_wait = ranks, on_wait
        self._patience = recipe.training.hang_timeout
        self._failed: set[str] = set()
        self._kept: dict[str, Mapping[str, Any]] = {}  # states that nobody here has taken over
        self._active: dict[str, Observer] = {}
        for name, make in factories.items():
            observer = self._guarded(name, _made, make, recipe)
            if observer is not None and (ranks.rank == 0 or observer.everywhere):
                self._active[name] = observer
        mine = {
            "everywhere": [name for name, observer in self._active.items() if observer.everywhere],
            "failed": sorted(self._failed),
            "waits": any(map(_uses_checkpoints, self._active.values())),
        }
        found = ranks.gather(mine)
        self._waits = any(each["waits"] for each in found)
        self._shared = [name for name in factories if any(name in each["everywhere"] for each in found)]
        self._forget([name for each in found for name in each["failed"] if name in self._shared])

    def start(self, run: RunInfo) -> None:
        """Let all of them begin."""
        self._call("on_start", run)

    def check(self) -> None:
        """Raise `failure`, if there is one."""
        if self.failure is not None:
            raise self.failure

    def load_state_dict(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Give each observer its state of a checkpoint; states of observers that are not here are kept for later."""
        self._kept = dict(states)
        for name, observer in list(self._active.items()):
            if name in states:
                self._guarded(name, observer.load_state_dict, dict(states[name]))
        self._agree()

    def state_dict(self) -> dict[str, Mapping[str, Any]]:
        """Name -> state, JSON values, of those that have one."""
        states = dict(self._kept)
        for name, observer in list(self._active.items()):
            state = self._guarded(name, _json_state, observer)
            if state:
                states[name] = state
        self._agree()
        return states

    def before_update(self, step: int) -> None:
        """See `Observer.before_update`."""
        self._call("before_update", step)

    def step(self, record: StepRecord) -> None:
        """See `Observer.on_step`."""
        self._call("on_step", record)

    def evaluation(self, found: Evaluation) -> None:
        """See `Observer.on_evaluation`."""
        self._call("on_evaluation", found)

    def tell(self, found: Measurement) -> None:
        """See `Observer.on_measurement`."""
        self._call_here("on_measurement", found)

    def save(self, step: int, stall_seconds: float) -> None:
        """See `Observer.on_save`."""
        self._call("on_save", step, stall_seconds)

    def rewind(self, step: int, said: str) -> None:
        """See `Observer.on_rewind`."""
        self._call("on_rewind", step, said)

    def end(self) -> None:
        """See `Observer.on_end`; makes no exchange, since ranks may end for different reasons."""
        self._call_here("on_end")

    def checkpoint(self, folder: Path) -> None:
        """See `Observer.on_checkpoint`: rank 0 calls it in a thread, so that no rank is taken for a hanging one."""
        if not self._waits:
            return
        thread = threading.Thread(target=self._call_here, args=("on_checkpoint", folder), name="observers", daemon=True)
        end = time.monotonic() + self._patience
        if self._ranks.rank == 0:
            thread.start()
        while True:
            if self._ranks.rank == 0:
                thread.join(_MEETING)
            late = time.monotonic() > end
            if self._ranks.from_first(not thread.is_alive() or late):
                break
            self._on_wait(f"waiting for what observers make of {folder}")
        if self._ranks.rank == 0 and thread.is_alive():
            for name in [name for name, each in self._active.items() if _uses_checkpoints(each)]:
                self._leave_out(name, TimeoutError(f"not done with {folder} after {self._patience:g} s"))
        self._agree()

    def _call(self, method: str, *arguments: Any) -> None:
        self._call_here(method, *arguments)
        self._agree()

    def _call_here(self, method: str, *arguments: Any) -> None:
        for name, observer in list(self._active.items()):
            self._guarded(name, getattr(observer, method), *arguments)

    def _guarded(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        # an observer may fail in any way at all, or leave; the run goes on
        except (Exception, SystemExit) as error:
            self._leave_out(name, error)
            return None

    def _leave_out(self, name: str, error: BaseException) -> None:
        if name in self._failed:  # one that was given up and comes back late
            return
        self._failed.add(name)
        observer = self._active.pop(name, None)
        said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        if observer is not None and observer.essential:
            failure = error if isinstance(error, UserError) else UserError(said, where=f"the observer {name}")
            self.failure = self.failure or failure
            return
        print(
            f"note: the observer {name} is left out from here on: {' '.join(said.split())}", file=sys.stderr, flush=True
        )

    def _agree(self) -> None:
        """Leave an observer that is `everywhere` out on every rank where it has failed on one."""
        if not self._shared:
            return
        flags = torch.tensor([float(name in self._failed) for name in self._shared], device=device.device())
        dist.all_reduce(flags)
        self._forget([name for name, failed in zip(self._shared, flags.tolist(), strict=True) if failed])

    def _forget(self, names: list[str]) -> None:
        for name in names:
            self._active.pop(name, None)
        self._shared = [name for name in self._shared if name not in names]


def observer_factories(recipe: Recipe) -> dict[str, Factory]:
    """What makes the observers of logging.observers, by name.

    Raises:
        UserError: a plugin that the recipe names cannot be loaded.
    """
    return {name: OBSERVERS.get(name) for name in recipe.logging.observers}


def _made(make: Factory, recipe: Recipe) -> Observer | None:
    observer = make(recipe)
    if observer is not None and not isinstance(observer, Observer):
        raise TypeError(f"it is a {type(observer).__name__}, not an Observer")
    return observer


def _json_state(observer: Observer) -> dict[str, Any]:
    # through JSON at once: what has no form there must fail the observer and not the save
    state: dict[str, Any] = json.loads(json.dumps(observer.state_dict()))
    return state


def _uses_checkpoints(observer: Observer) -> bool:
    return type(observer).on_checkpoint is not Observer.on_checkpoint
