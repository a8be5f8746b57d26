"""Runs so small that a step takes milliseconds: their data, their recipe, and what there is to compare of them.

The workers run inside `tests.distributed.forked`; this module imports what is slow to import, so that forks need not.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  (forks should find it imported)
import numpy as np
import torch
import torch.distributed as dist
import yaml

from minicpm_megatron.cli import entry
from minicpm_megatron.cli.train import main
from minicpm_megatron.data.indexed_format import bin_path, idx_path, token_dtype, write_index
from minicpm_megatron.data.metadata import TokenMetadata, json_path
from minicpm_megatron.recipe import Recipe
from minicpm_megatron.storage.checksum import file_sha256
from minicpm_megatron.training import report
from minicpm_megatron.training.datasets import train_reader
from minicpm_megatron.training.metrics import METRICS, read_metrics
from minicpm_megatron.training.objectives.mean_token_loss import MeanTokenLoss
from minicpm_megatron.training.run_data import RunData
from minicpm_megatron.training.stepping import Reader, Stepper
from minicpm_megatron.training.trainer import Trainer
from tests.device import deterministic
from tests.distributed.forked import Outcome

VOCABULARY = 512
MODEL: dict[str, Any] = {"vocab_size": VOCABULARY, "dim_model_base": 64}
STEPS, HALF = 20, 10


def write_tokens(prefix: Path, tokens: int, seed: int) -> Path:
    """Documents of a sequence with structure to learn (each id follows from the one before, mostly), tokenised."""
    chance = np.random.default_rng(seed)
    ids = np.empty(tokens, dtype=token_dtype(VOCABULARY))
    ids[0] = 1
    jumps = chance.random(tokens) < 0.2
    free = chance.integers(0, VOCABULARY, tokens)
    for place in range(1, tokens):
        ids[place] = free[place] if jumps[place] else (int(ids[place - 1]) * 5 + 3) % VOCABULARY
    prefix.parent.mkdir(parents=True, exist_ok=True)
    bin_path(prefix).write_bytes(ids.tobytes())
    lengths = np.full(tokens // 100, 100, dtype=np.int32)
    with open(idx_path(prefix), "wb") as handle:
        write_index(handle, ids.dtype, len(lengths), [lengths])
    TokenMetadata(
        vocab_size=VOCABULARY,
        max_id=int(ids.max()),
        tokenizer_sha256="0" * 64,
        bos_id=None,
        eod_id=None,
        dtype=ids.dtype.name,
        documents=len(lengths),
        tokens=tokens,
        text_bytes=3 * tokens,
        records=len(lengths),
        rejected={},
        bin_bytes=bin_path(prefix).stat().st_size,
        idx_bytes=idx_path(prefix).stat().st_size,
        bin_sha256=file_sha256(bin_path(prefix)),
        idx_sha256=file_sha256(idx_path(prefix)),
        plan="",
    ).write(json_path(prefix))
    return prefix


def write_recipe(folder: Path, **sections: dict[str, Any]) -> Path:
    """A recipe of 20 steps on two ranks with accumulation, whose decay begins at step 10; and its data."""
    train = folder / "data" / "train"
    if not bin_path(train).exists():
        write_tokens(train, 20_000, seed=0)
        write_tokens(folder / "data" / "held-out", 4_000, seed=1)
    recipe: dict[str, dict[str, Any]] = {
        "model": MODEL,
        "data": {
            "train": [{"prefix": str(train)}],
            "validation": {"held-out": str(folder / "data" / "held-out")},
            "sequence_length": 32,
        },
        "training": {"global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32"},
        "optimizer": {"lr": 0.005},
        "schedule": {"warmup": 4, "total": STEPS, "decay": STEPS - HALF, "decay_shape": "linear"},
        "evaluation": {"interval": 5, "batches": 1},
        "checkpoint": {"interval": HALF, "keep_last": 9},
        "logging": {"interval": 1, "tensorboard": False},
        "run": {"directory": str(folder / "runs")},
    }
    for section, changes in sections.items():
        recipe[section] = recipe.get(section, {}) | changes
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"preset": "minicpm-nano"} | recipe))
    return path


def case(recipe: Path, name: str, *overrides: str, **extra: Any) -> dict[str, Any]:
    """A case for `train`: the recipe under a name, with overrides."""
    return {"arguments": ["--recipe", str(recipe), f"name={name}", *overrides], "run": name, **extra}


def check(outcome: list[Outcome], *statuses: int) -> None:
    """The ranks ended with these statuses (0 unless given)."""
    found = [rank.result["status"] if rank.result else rank.status for rank in outcome]
    assert found == (list(statuses) or [0] * len(outcome)), "\n".join(rank.log for rank in outcome)


class Recorded:
    """A reader of training data that notes what is read.

    Args:
        samples: gets [first sample, size, hash of this rank's tokens] of each batch.
        shift: samples that every position is moved by.
        on_read: called with the position of each batch.
    """

    def __init__(self, reader: Reader, samples: list[list[Any]], shift: int, on_read: Callable[[int], None]) -> None:
        self.fields, self.sequences = reader.fields, reader.sequences
        self._reader, self._samples, self._shift, self._on_read = reader, samples, shift, on_read

    def micro_batches(self, first_sample: int, global_batch_size: int, row_length: int | None = None) -> Iterator[Any]:
        self._on_read(first_sample)
        tokens = []
        for batch in self._reader.micro_batches(first_sample + self._shift, global_batch_size, row_length):
            tokens.append(batch[0].cpu().numpy().tobytes())
            yield batch
        self._samples.append([first_sample, global_batch_size, hashlib.sha256(b"".join(tokens)).hexdigest()])


def trainer_with(
    before_step: Callable[[Stepper], bool | None],
    disturbances: list[Callable[[torch.Tensor], torch.Tensor]],
    read: Callable[..., Reader] = train_reader,
    observers: Mapping[str, Any] | None = None,
) -> Callable[..., Trainer]:
    """What makes a trainer that is disturbed.

    Args:
        before_step: called before every step; true: the step does not happen, and is counted as done.
        disturbances: what each does to the token losses of every micro-batch.
        read: opens the training data.
        observers: beside the recipe's.
    """

    class Steps(Stepper):
        def step(self) -> bool:
            if before_step(self):
                self.run.step += 1
                return False
            return super().step()

    class Disturbed(MeanTokenLoss):
        def __call__(self, token_losses: torch.Tensor, fields: Mapping[str, torch.Tensor]) -> torch.Tensor:
            for disturb in disturbances:
                token_losses = disturb(token_losses)
            return super().__call__(token_losses, fields)

    return functools.partial(Trainer, make_stepper=Steps, objective=Disturbed, read=read, observers=observers)


def train(
    rank: int,
    case: dict[str, Any],
    *,
    before_step: Callable[[Stepper], bool | None] = lambda stepper: None,
    on_losses: Callable[[torch.Tensor], torch.Tensor] = lambda losses: losses,
    on_read: Callable[[int], None] = lambda first: None,
    observers: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run the command's own `main`, killed before update case["kill_at"] if that is given.

    Args:
        before_step, observers: see `trainer_with`.
        on_losses: what is done to the token losses of every micro-batch.
        on_read: called with the position of each batch.
        case: "arguments" of the command; "shift": samples that every position is moved by; "kill_at": the step that
            rank "kill_rank" does not survive, in the middle of an asynchronous save only where "in_save" is set;
            "hang_at": the step in which rank "hang_rank" does "hang", see `_hang`; "poison": what is done to the
            numbers of step "poison_at" on rank "poison_rank", see `POISONS` (the checkpoint of the step is copied to
            before/ first); "begin_with": a checkpoint that the run finds as its own.

    Returns:
        "status", and "samples": [first sample, size, hash of this rank's tokens] of each batch.
    """
    deterministic()
    begin_with = case.get("begin_with")
    if begin_with is not None:
        if rank == 0:
            checkpoint = Path(begin_with)
            shutil.copytree(checkpoint, checkpoint.parents[2] / case["run"] / "checkpoints" / checkpoint.name)
        dist.barrier()
    samples: list[list[Any]] = []
    disturbances = [on_losses]

    def before(stepper: Stepper) -> bool | None:
        run = stepper.run
        if run.step in (case.get("kill_at"), case.get("poison_at")) and not case.get("in_save"):
            run.checkpointer.wait()  # the test counts on the one before
        if run.step == case.get("kill_at") and rank == case.get("kill_rank", 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if run.step == case.get("hang_at") and rank == case.get("hang_rank", 1):
            _hang(case["hang"])
        if run.step == case.get("poison_at") and rank == case.get("poison_rank", 1):
            shutil.copytree(run.checkpointer.directory / f"step-{run.step}", run.folder / "before", dirs_exist_ok=True)
            disturbances.append(POISONS[case["poison"]])
        return before_step(stepper)

    def read(recipe: Recipe, data: RunData) -> Reader:
        return Recorded(train_reader(recipe, data), samples, case.get("shift", 0), on_read)

    make_trainer = trainer_with(before, disturbances, read, observers)
    entry.RANK_0_GRACE = 0.0
    report.finish = lambda folder, recipe: None  # a picture takes longer than the run
    status = None
    try:
        entry.run(lambda: main(case["arguments"], make_trainer))
    except SystemExit as end:
        status = end.code
    return {"status": status, "samples": samples}


def _hang(how: str) -> None:
    """Stop making progress: in the middle of something, or as a process that is stopped from outside."""
    if how == "sleep":
        time.sleep(100)
    if os.fork() == 0:  # a stopped process cannot end itself
        time.sleep(25)
        os.kill(os.getppid(), signal.SIGKILL)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGSTOP)


class Infinite(torch.autograd.Function):
    """A number of the same value whose gradient is not finite."""

    @staticmethod
    def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf")


# what makes the loss, or one gradient, of a rank not finite
POISONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "loss": lambda losses: losses * float("nan"),
    "gradient": Infinite.apply,
}


def tensors(folder: Path) -> dict[str, str]:
    """File -> hash, of what a checkpoint holds in numbers: weights, moments, random state."""
    return {path.name: file_sha256(path) for path in sorted(folder.glob("*.safetensors"))}


def state(folder: Path) -> dict[str, Any]:
    """Where a checkpoint says the run stands."""
    return json.loads((folder / "manifest.json").read_text())["state"]


def steps(run: Path) -> dict[int, tuple[float, float]]:
    """Step -> (loss, gradient norm)."""
    return {record["step"]: (record["loss"], record["gradient_norm"]) for record in read_metrics(run / METRICS)}


def held_out(run: Path, step: int) -> float:
    """Nats a token at the evaluation after `step`."""
    return next(r["loss_per_token"] for r in read_metrics(run / METRICS, "evaluation") if r["step"] == step)


def losses(run: Path) -> list[tuple[Any, ...]]:
    """What metrics.jsonl says of every step, without times."""
    keys = ("step", "tokens", "loss", "lr", "gradient_norm")
    held_out = ("step", "set", "tokens", "loss_per_token", "loss_per_byte")
    train = [tuple(record[key] for key in keys) for record in read_metrics(run / METRICS)]
    return train + [tuple(record[key] for key in held_out) for record in read_metrics(run / METRICS, "evaluation")]
