"""Losses on held-out sets against a direct sum over the same tokens with the independent forward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minicpm_megatron.data.dataset import TokenDataset
from minicpm_megatron.recipe import load_recipe
from minicpm_megatron.training.metrics import METRICS, read_metrics
from minicpm_megatron.training.run_data import VALIDATION_SEED
from tests.convert.conftest import canonical_logits, read_checkpoint
from tests.distributed.forked import Outcome, run_forked
from tests.training import nano

SETS = {"large": 4_000, "small": 700}  # tokens; the small set is less than one global batch
SEQUENCE = 32  # of nano's recipe


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Outcome]]]:
    folder = tmp_path_factory.mktemp("evaluation")
    prefixes = {
        name: str(nano.write_tokens(folder / name, tokens, seed)) for seed, (name, tokens) in enumerate(SETS.items(), 5)
    }
    recipe = nano.write_recipe(
        folder, data={"validation": prefixes}, evaluation={"interval": 3, "batches": 100}, checkpoint={"interval": None}
    )
    stop = "training.stop_after=4"
    cases = {
        "dp2": nano.case(recipe, "dp2", stop),
        "tp2": nano.case(recipe, "tp2", stop, "parallel.tensor_model_parallel_size=2", "deepspeed.zero_stage=0"),
        "pp2": nano.case(recipe, "pp2", stop, "parallel.pipeline_model_parallel_size=2"),
        "cp2": nano.case(recipe, "cp2", stop, "parallel.context_parallel_size=2"),
        "zero3": nano.case(recipe, "zero3", stop, "deepspeed.zero_stage=3"),
        "none": nano.case(recipe, "none", stop, "evaluation.interval=null"),
    }
    return folder, dict(zip(cases, run_forked("tests.training.nano:train", list(cases.values())), strict=True))


def _direct(folder: Path, run: str, name: str, samples: int) -> float:
    """Mean loss in nats per token over the first `samples` samples of a set."""
    model = load_recipe(folder / "runs" / run / "recipe.yaml").model
    tensors = read_checkpoint(folder / "runs" / run / "checkpoints" / "step-4")
    held_out = TokenDataset(folder / name, SEQUENCE, VALIDATION_SEED)
    losses = []
    for sample in range(samples):
        row = torch.from_numpy(held_out[sample])
        losses.append(torch.nn.functional.cross_entropy(canonical_logits(model, tensors, row[:-1]).double(), row[1:]))
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("run", ["dp2", "tp2", "pp2", "cp2", "zero3"])
def test_the_loss_is_the_mean_over_the_whole_set(run: str, jobs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    folder, outcomes = jobs
    nano.check(outcomes[run])
    records = read_metrics(folder / "runs" / run / METRICS, "evaluation")
    assert [(record["step"], record["set"]) for record in records] == [
        (3, "large"),
        (3, "small"),
        (4, "large"),
        (4, "small"),
    ]
    # 124 samples are 15 global batches of 8; 21 samples are less than 3, and none is read twice
    for record, samples in zip(records[2:], (120, 16), strict=True):
        direct = _direct(folder, run, record["set"], samples)
        assert record["loss_per_token"] == pytest.approx(direct, rel=1e-5)
        # nano's metadata counts 3 bytes of text a token
        assert record["loss_per_byte"] == pytest.approx(direct / 3, rel=1e-5)


def test_looking_changes_nothing(jobs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    folder, outcomes = jobs
    nano.check(outcomes["none"])
    seen, unseen = (folder / "runs" / run / "checkpoints" / "step-4" for run in ("dp2", "none"))
    assert nano.tensors(seen) == nano.tensors(unseen)
