"""Stages of a run with other contexts: shorter samples first, and a new run with another one's weights."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import load_recipe
from minicpm_megatron.training.batches import BatchReader
from minicpm_megatron.training.metrics import METRICS, read_metrics
from minicpm_megatron.training.start import initial_weights
from tests.distributed.forked import Outcome, run_forked
from tests.training import nano

pytestmark = pytest.mark.timeout(600)  # one fixture runs every job of the file

LENGTH, CHANGES = 32, [(4, 8), (12, 16)]  # rows of 8 tokens for 4 steps, then of 16 until step 12
CURRICULUM = "data.curriculum=" + json.dumps([{"until": until, "sequence_length": row} for until, row in CHANGES])
PACKED = "data.reset_attention_mask=true"
LAYOUTS = {
    "zero3": ["deepspeed.zero_stage=3"],
    "tp2": ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
    "cp2": ["parallel.context_parallel_size=2", "training.micro_batch_size=4"],
    "pp2": ["parallel.pipeline_model_parallel_size=2"],
}
LONGER = ["data.sequence_length=64", "model.rotary_base=40000.0", "model.max_position_embeddings=512"]
LONGER += ["training.global_batch_size=4", "schedule.warmup=0", "schedule.total=8", "schedule.decay=4"]
LONGER += ["checkpoint.interval=2"]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Outcome]]]:
    folder = tmp_path_factory.mktemp("stages")
    recipe = nano.write_recipe(folder)
    cases = {
        "whole": nano.case(recipe, "whole", CURRICULUM),
        "killed": nano.case(recipe, "cut", CURRICULUM, kill_at=12),
        "resumed": nano.case(recipe, "cut", CURRICULUM),
        "other past": nano.case(recipe, "cut", CURRICULUM.replace("12", "9"), "schedule.total=30"),
        "packed": nano.case(recipe, "packed", CURRICULUM, PACKED),
        "packed cp2": nano.case(recipe, "packed-cp2", CURRICULUM, PACKED, *LAYOUTS["cp2"]),
    }
    cases |= {name: nano.case(recipe, name, CURRICULUM, *layout) for name, layout in LAYOUTS.items()}
    weights = ["--init-from", "whole@10"]
    cases |= {
        "same": nano.case(recipe, "same", *weights, "schedule.warmup=0"),
        "longer": nano.case(recipe, "longer", *weights, *LONGER),
        "longer tp2": nano.case(recipe, "longer-tp2", *weights, *LONGER, *LAYOUTS["tp2"]),
        "longer killed": nano.case(recipe, "longer-cut", *weights, *LONGER, kill_at=5),
        "longer resumed": nano.case(recipe, "longer-cut", *weights, *LONGER),
        "other model": nano.case(recipe, "other", *weights, "model.num_layers=3"),
        "both ways": nano.case(recipe, "both", *weights, "--from", "whole@10"),
        "other optimizer": nano.case(recipe, "other-optimizer", *weights, "optimizer.name=muon"),
        "other weights": nano.case(recipe, "longer", "--init-from", "whole@20", *LONGER),
    }
    outcomes = run_forked("tests.training.nano:train", list(cases.values()))
    return folder / "runs", dict(zip(cases, outcomes, strict=True))


def curve(runs: Path, name: str) -> list[float]:
    return [record["loss"] for record in read_metrics(runs / name / METRICS)]


def test_rows_grow_as_the_curriculum_says_over_the_same_tokens(jobs):
    runs, outcomes = jobs
    nano.check(outcomes["whole"])
    records = read_metrics(runs / "whole" / METRICS)
    assert [record["sequence_length"] for record in records] == [8] * 4 + [16] * 8 + [LENGTH] * 8
    assert [record["tokens"] for record in records] == [256 * step for step in range(1, 21)]
    assert records[-1]["loss"] < records[0]["loss"] - 0.3


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_run(name, jobs):
    runs, outcomes = jobs
    nano.check(outcomes[name])
    assert curve(runs, name) == pytest.approx(curve(runs, "whole"), rel=1e-5)
    evaluations = [read_metrics(runs / run / METRICS, "evaluation") for run in (name, "whole")]
    losses = [[record["loss_per_token"] for record in records] for records in evaluations]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_packed_documents_end_in_rows_too(jobs):
    runs, outcomes = jobs
    for name in ("packed", "packed cp2"):
        nano.check(outcomes[name])
    assert curve(runs, "packed-cp2") == pytest.approx(curve(runs, "packed"), rel=1e-5)
    assert curve(runs, "packed")[-1] != pytest.approx(curve(runs, "whole")[-1], rel=1e-4)


def test_a_killed_run_goes_on_bit_for_bit_across_a_change(jobs):
    runs, outcomes = jobs
    assert -signal.SIGKILL in [rank.status for rank in outcomes["killed"]]
    nano.check(outcomes["resumed"])
    first, second = (runs / name / "checkpoints" / "step-20" for name in ("whole", "cut"))
    assert nano.tensors(first) == nano.tensors(second)
    assert nano.losses(runs / "whole") == nano.losses(runs / "cut")
    nano.check(outcomes["other past"], 2, 2)
    assert "data.curriculum: would have fed step 10 rows of 32 tokens and not of 16" in outcomes["other past"][0].log


def test_a_stage_begins_where_its_weights_stood(jobs):
    runs, outcomes = jobs
    nano.check(outcomes["same"])
    assert "starting with the weights and moments of whole@10" in outcomes["same"][0].log
    before = [record for record in read_metrics(runs / "whole" / METRICS, "evaluation") if record["step"] == 10]
    after = read_metrics(runs / "same" / METRICS, "evaluation")[0]
    assert after["step"] == 0 and after["loss_per_token"] == before[0]["loss_per_token"]
    state = nano.state(runs / "same" / "checkpoints" / "step-10")
    assert (state["step"], state["updates"], state["samples"]) == (10, 20, 80)
    assert state["origin"] == {"run": str(runs / "whole"), "step": 10}


def test_a_stage_has_data_lengths_rope_and_schedule_of_its_own(jobs):
    runs, outcomes = jobs
    for name in ("longer", "longer tp2"):
        nano.check(outcomes[name])
    records = read_metrics(runs / "longer" / METRICS)
    assert [record["step"] for record in records] == list(range(1, 9))
    assert {record["sequence_length"] for record in records} == {64}
    assert records[0]["loss"] < curve(runs, "whole")[0] - 0.3  # it did not start from nothing
    assert curve(runs, "longer-tp2") == pytest.approx(curve(runs, "longer"), rel=1e-5)


def test_a_killed_stage_goes_on_when_started_again(jobs):
    runs, outcomes = jobs
    assert -signal.SIGKILL in [rank.status for rank in outcomes["longer killed"]]
    nano.check(outcomes["longer resumed"])
    assert "at step 4" in outcomes["longer resumed"][0].log
    first, second = (runs / name / "checkpoints" / "step-8" for name in ("longer", "longer-cut"))
    assert nano.tensors(first) == nano.tensors(second)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other model", "model.num_layers: is 3, and 2 in whole@10"),
        ("other optimizer", "optimizer.name: whole@10 was trained with adamw, whose moments muon has no use for"),
        ("both ways", "--from and --init-from: a run starts in one way; give one of them"),
        ("other weights", "has checkpoints already, and is from"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(name, words, jobs):
    runs, outcomes = jobs
    nano.check(outcomes[name], 2, 2)
    errors = [line for line in outcomes[name][0].log.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0] and "Traceback" not in outcomes[name][0].log


def test_another_optimizer_is_refused_before_anything_is_built(jobs):
    """So a dry run refuses it, too."""
    runs, _ = jobs
    recipe = load_recipe(runs / "whole" / "recipe.yaml", ["name=dry", "optimizer.name=muon"])
    with pytest.raises(UserError, match="optimizer.name: whole@10 was trained with adamw"):
        initial_weights(recipe, "whole@10", lambda folder: pytest.fail("no folder of another format"))


@pytest.mark.parametrize("row", [4, 8, 16])
def test_rows_are_the_sample_cut(row):
    length, rows = 16, 3
    documents = [[5, 11], [2], [7, 9, 16]]  # where documents end

    class Samples:
        sequence_length = length

        def __getitem__(self, sample: int) -> np.ndarray:
            return np.arange(100 * sample, 100 * sample + length + 1)

        def starts(self, sample: int) -> np.ndarray:
            ends = [0, *documents[sample], length]
            return np.array([max(end for end in ends if end <= place) for place in range(length)])

    reader = BatchReader(Samples(), micro_batch_size=rows, rank=0, size=1, documents=True)
    ((tokens, labels, starts),) = reader.micro_batches(0, rows, row)
    assert tokens.shape == labels.shape == starts.shape == (rows * length // row, row)
    assert torch.equal(labels, tokens + 1)
    for number in range(len(tokens)):
        sample, first = divmod(number * row, length)
        assert tokens[number].tolist() == list(range(100 * sample + first, 100 * sample + first + row))
        for place in range(row):
            wanted = Samples().starts(sample)[first + place] - first
            assert starts[number, place] == max(0, wanted)
