"""Losses on held-out sets against a direct sum over the same tokens with the independent forward pass."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from minicpm_megatron.data.dataset import TokenDataset
from minicpm_megatron.data.metadata import json_path
from minicpm_megatron.data.tokenizer_training import train_tokenizer
from minicpm_megatron.data.tokenizers.sentencepiece import SentencePieceTokenizer
from minicpm_megatron.recipe import load_recipe
from minicpm_megatron.training.metrics import METRICS, read_metrics
from minicpm_megatron.training.run_data import VALIDATION_SEED
from tests.convert.conftest import canonical_logits, read_checkpoint
from tests.data.conftest import texts, write_jsonl
from tests.data.preprocess_helpers import run as tokenize
from tests.data.surfaces import surface_bytes
from tests.distributed.forked import Outcome, run_forked
from tests.training import nano

SETS = {"large": (4_000, 124), "small": (700, 21), "tiny": (100, 3)}  # tokens, samples; a global batch has 8
SEQUENCE = 32  # of nano's recipe
LAYOUTS = {
    "dp2": [],
    "alone": ["training.micro_batch_size=1"],
    "wide": ["training.micro_batch_size=4"],
    "tp2": ["parallel.tensor_model_parallel_size=2", "deepspeed.zero_stage=0"],
    "pp2": ["parallel.pipeline_model_parallel_size=2"],
    "pp2 wide": ["parallel.pipeline_model_parallel_size=2", "training.micro_batch_size=8", "training.fused_loss=false"],
    "cp2": ["parallel.context_parallel_size=2"],
    "zero3": ["deepspeed.zero_stage=3"],
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Outcome]]]:
    folder = tmp_path_factory.mktemp("evaluation")
    prefixes = {
        name: str(nano.write_tokens(folder / name, tokens, seed))
        for seed, (name, (tokens, _)) in enumerate(SETS.items(), 5)
    }
    recipe = nano.write_recipe(
        folder, data={"validation": prefixes}, evaluation={"interval": 3, "batches": 100}, checkpoint={"interval": None}
    )
    stop = "training.stop_after=4"
    cases = {
        name: nano.case(recipe, name.replace(" ", "-"), stop, *overrides, ranks=1 if name == "alone" else 2)
        for name, overrides in LAYOUTS.items()
    }
    cases["none"] = nano.case(recipe, "none", stop, "evaluation.interval=null")
    for suffix in (".bin", ".idx"):  # tokens of another program: nothing says what they are of
        (folder / f"foreign{suffix}").symlink_to(folder / f"tiny{suffix}")
    part = ["training.stop_after=1", "evaluation.batches=1", "evaluation.interval=1"]
    sets = {name: str(folder / name) for name in ("small", "tiny", "foreign")}
    cases["part"] = nano.case(recipe, "part", *part, f"data.validation={json.dumps(sets)}")
    overrides = [f"data.{key}={value}" for key, value in _text(folder).items()] + ["model.vocab_size=700"]
    cases["text"] = nano.case(recipe, "text", *part, *overrides)
    cases["text cp2"] = nano.case(recipe, "text-cp2", *part, *overrides, *LAYOUTS["cp2"])
    return folder, dict(zip(cases, run_forked("tests.training.nano:train", list(cases.values())), strict=True))


def _text(folder: Path) -> dict[str, str]:
    """Chinese and code as one set, whose bytes a token differ."""
    documents = texts(60)
    corpus = write_jsonl(folder / "corpus.jsonl", documents)
    train_tokenizer([str(corpus)], 700, folder / "tokenizer", show_progress=False)
    tokenize([corpus], folder / "tokenizer", folder / "text")
    return {
        "train": f"[{{prefix: {folder}/text}}]",
        "validation": f"{{text: {folder}/text}}",
        "tokenizer": str(folder / "tokenizer"),
    }


def _evaluations(folder: Path, run: str) -> list[dict]:
    return read_metrics(folder / "runs" / run.replace(" ", "-") / METRICS, "evaluation")


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


@pytest.mark.parametrize("run", LAYOUTS)
def test_the_loss_is_the_mean_over_the_whole_set(run: str, jobs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    folder, outcomes = jobs
    nano.check(outcomes[run])
    records = _evaluations(folder, run)
    assert [(record["step"], record["set"]) for record in records] == [(step, name) for step in (3, 4) for name in SETS]
    # every sample counts once: the sets are no multiples of a batch, and two are smaller than one
    for record, (_, samples) in zip(records[3:], SETS.values(), strict=True):
        direct = _direct(folder, run.replace(" ", "-"), record["set"], samples)
        assert record["loss_per_token"] == pytest.approx(direct, rel=1e-5)
        # nano's metadata counts 3 bytes of text a token
        assert record["loss_per_byte"] == pytest.approx(direct / 3, rel=1e-5)


def test_no_layout_changes_the_number(jobs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    folder, _ = jobs
    found = {run: [record["loss_per_token"] for record in _evaluations(folder, run)] for run in LAYOUTS}
    assert found == {run: pytest.approx(found["alone"], rel=1e-5) for run in LAYOUTS}


def test_looking_changes_nothing(jobs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    folder, outcomes = jobs
    nano.check(outcomes["none"])
    seen, unseen = (folder / "runs" / run / "checkpoints" / "step-4" for run in ("dp2", "none"))
    assert nano.tensors(seen) == nano.tensors(unseen)


@pytest.mark.parametrize("run", ["text", "text cp2"])
def test_the_loss_per_byte_is_over_the_bytes_that_were_read(
    run: str, jobs: tuple[Path, dict[str, list[Outcome]]]
) -> None:
    folder, outcomes = jobs
    nano.check(outcomes[run])
    (record,) = _evaluations(folder, run)
    dataset, tokenizer = (
        TokenDataset(folder / "text", SEQUENCE, VALIDATION_SEED),
        SentencePieceTokenizer(folder / "tokenizer"),
    )
    documents, (epoch, order) = texts(60), dataset._epoch(0)
    stream = [documents[number] for number in epoch.order.take(np.arange(len(documents)))]
    of_tokens = surface_bytes(tokenizer, stream)
    samples = range(8)  # one global batch
    read = sum(sum(of_tokens[order(k) * SEQUENCE + 1 :][:SEQUENCE]) for k in samples)
    nats = record["loss_per_token"] * SEQUENCE * len(samples)
    assert record["loss_per_byte"] == pytest.approx(nats / read, rel=1e-9)
    assert dataset.metadata is not None
    whole = dataset.metadata.tokens / dataset.metadata.text_bytes
    assert abs(record["loss_per_byte"] / (record["loss_per_token"] * whole) - 1) > 0.02  # the test can tell them apart


def test_a_loss_per_byte_that_is_not_known_is_left_out(jobs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    folder, outcomes = jobs
    nano.check(outcomes["part"])
    assert not json_path(folder / "foreign").exists()
    records = _evaluations(folder, "part")
    losses = {record["set"]: record["loss_per_token"] for record in records}
    assert losses["foreign"] == losses["tiny"] > 0
    # one global batch without a tokenizer: only a set of ours that it holds whole has known bytes
    assert [record["set"] for record in records if record["loss_per_byte"] is not None] == ["tiny"]
    assert outcomes["part"][0].log.count("/byte)") == 1
