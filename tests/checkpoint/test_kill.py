"""A save that is killed anywhere, on any rank, leaves the checkpoint before or the new one, whole."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import torch

from minicpm_megatron.checkpoint import Checkpointer
from minicpm_megatron.checkpoint.publish import PHASES
from minicpm_megatron.checkpoint.run_state import RunState
from tests.distributed.forked import run_forked
from tests.storage import synthetic

OLD, NEW = 1, 2
# what changes a disk; a rank is killed just before the n-th of these calls
CALLS_OF_A_SAVE = 26  # and a few more
CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync")


def save(checkpointer: Checkpointer, step: int, seed: int, rank: int, ranks: int) -> None:
    """Save the synthetic model of `seed` as data-parallel ranks hold it."""
    checkpointer.save(
        step,
        synthetic.fragments(synthetic.tensors(seed), 1, ranks, 0, rank),
        rank_tensors={"torch": torch.full((4,), rank, dtype=torch.uint8)},
        state=RunState(step=step),
        facts={"seed": seed},
    )


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_before_call(number: int) -> None:
    count = 0

    def patched(original: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                _kill()
            return original(*arguments, **keywords)

        return call

    for name in CALLS:
        setattr(os, name, patched(getattr(os, name)))


def worker(rank: int, case: dict[str, Any]) -> str:
    import torch.distributed as dist

    def on_phase(phase: str) -> None:
        if rank == case["rank"] and phase == case.get("phase"):
            _kill()

    checkpointer = Checkpointer(Path(case["folder"]), keep_last=1, group=dist.group.WORLD, on_phase=on_phase)
    if rank == case["rank"] and "call" in case:
        _kill_before_call(case["call"])
    save(checkpointer, case["step"], case["seed"], rank, 2)
    return "saved"


def _cases() -> list[dict[str, Any]]:
    by_phase = [{"rank": rank, "phase": phase} for rank in (0, 1) for phase in PHASES]
    by_call = [{"rank": 0, "call": call} for call in range(1, CALLS_OF_A_SAVE)] + [
        {"rank": 1, "call": call} for call in (1, 2, 3)
    ]
    return [case | {"step": step} for step in (NEW, OLD) for case in by_phase + by_call]


def test_a_kill_anywhere_leaves_one_whole_checkpoint(tmp_path: Path) -> None:
    trunk = tmp_path / "before"
    save(Checkpointer(trunk), OLD, seed=1, rank=0, ranks=1)
    cases = [case | {"seed": 2, "folder": str(tmp_path / str(number))} for number, case in enumerate(_cases())]
    for case in cases:
        shutil.copytree(trunk, case["folder"])
    outcomes = run_forked("tests.checkpoint.test_kill:worker", cases)
    ends = []
    for case, outcome in zip(cases, outcomes, strict=True):
        checkpointer = Checkpointer(Path(case["folder"]), keep_last=1)
        found = checkpointer.find_latest()
        assert found is not None, case
        loaded = checkpointer.open(found)
        seed = loaded.manifest["seed"]
        # a new save of the same step and one of the next step: either is what it was, or all new
        assert (loaded.state.step, seed) in ((OLD, 1), (case["step"], 2)), case
        for (name, kind), whole in synthetic.tensors(seed).items():
            assert torch.equal(loaded.reader.read(name, kind), whole), case
        ends.append((outcome[case["rank"]].status, seed))
        if [rank.result for rank in outcome] == ["saved", "saved"]:
            assert seed == 2, case
        names = {path.name for path in checkpointer.directory.iterdir()}
        assert names <= {"latest", "step-1", "step-2"}, (case, names)
        save(checkpointer, 3, seed=3, rank=0, ranks=1)
        assert checkpointer.find_latest() == checkpointer.directory / "step-3", case
    assert {(-signal.SIGKILL, 1), (-signal.SIGKILL, 2), (0, 2)} <= set(ends), "kills before, after and not at all"
    last = [
        [rank.result for rank in outcome]
        for case, outcome in zip(cases, outcomes, strict=True)
        if case.get("call") == CALLS_OF_A_SAVE - 1
    ]
    assert last == [["saved", "saved"]] * 2, "there are more calls to be killed at"
    # every phase that a rank passes is one at which it was killed
    reached = {
        (case["rank"], case["phase"])
        for case, end in zip(cases, ends, strict=True)
        if "phase" in case and end[0] == -signal.SIGKILL
    }
    assert {phase for rank, phase in reached if rank == 0} == set(PHASES)
    assert {phase for rank, phase in reached if rank == 1} == set(PHASES) - {"manifest", "rename", "latest"}
