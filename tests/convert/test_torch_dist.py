"""Torch_dist checkpoints that Megatron-Core and Megatron-LM saved: weights, optimizer state, and going on with them."""

from __future__ import annotations

import io
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from minicpm_megatron.convert import convert, open_source, recognise
from minicpm_megatron.derive.untie import untie
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import ModelRecipe, get_preset
from minicpm_megatron.storage.manifest import problems, read_manifest
from minicpm_megatron.storage.sharded import CheckpointReader
from tests.convert.conftest import assert_bit_equal, canonical_logits, random_tensors, read_checkpoint
from tests.convert.megatron_cases import (
    BETAS,
    EXPERTS,
    ITERATION,
    LEARNING_RATE,
    LENGTH,
    SAMPLES_A_STEP,
    SEED,
    UNTIED,
    UPDATES,
    WEIGHT_DECAY,
    case,
    model_of,
    run,
)
from tests.convert.test_logits import assert_close, transformers_logits
from tests.distributed.forked import run_forked

Cases = dict[str, tuple[dict[str, Any], dict[str, Any]]]  # name -> fields of the model, and how it is saved
BY_NUMBER = {"metadata": {"non_homogeneous_layers": True}}
SAVED: Cases = {
    "dense": ({}, {}),
    "dense, TP 2": ({}, {"ranks": 2, "tp": 2, "checksums": True}),
    "untied, TP 2, layers by number": (UNTIED, {"ranks": 2, "tp": 2} | BY_NUMBER),
    "experts": (EXPERTS, {}),
    "experts, TP 2": (EXPERTS, {"ranks": 2, "tp": 2}),
    "experts, EP 2, layers by number": (EXPERTS, {"ranks": 2, "ep": 2} | BY_NUMBER),
    "experts, TP 2, alone": (EXPERTS, {"ranks": 2, "tp": 2, "metadata": {"singleton_local_shards": True}}),
    "dense, PP 2": ({}, {"ranks": 2, "pp": 2}),
    "stock layers, TP 2": ({}, {"ranks": 2, "tp": 2, "stock": True}),
    "stock layers, experts": (EXPERTS, {"stock": True}),
    "hybrid, TP 2": ({}, {"ranks": 2, "tp": 2, "hybrid": True}),
    "hybrid, experts, untied": (EXPERTS | UNTIED, {"hybrid": True}),
}
LM = "Megatron-LM, TP 2"
# our trainer's model for tests, see tests/training/nano.py
NANO: dict[str, Any] = get_preset("minicpm-nano").model_dump(mode="json") | {"vocab_size": 512, "dim_model_base": 64}
DISTRIBUTED = {"ranks": 2, "precision": "bf16", "distributed": True}
BY_NAME = {"metadata": {"distrib_optim_sharding_type": "fully_reshardable"}}
IN_BUCKETS = {"metadata": {"distrib_optim_sharding_type": "dp_reshardable"}}
TRAINED: Cases = {
    "fp32, TP 2": ({}, {"ranks": 2, "tp": 2, "precision": "fp32"}),
    "fp32, experts, EP 2": (EXPERTS, {"ranks": 2, "ep": 2, "precision": "fp32"}),
    "fp32, Megatron-LM, TP 2": (NANO, {"ranks": 2, "tp": 2, "precision": "fp32", "lm": True}),
    "bf16, TP 2": ({}, {"ranks": 2, "tp": 2, "precision": "bf16"}),
    "bf16, distributed over DP 2": ({}, DISTRIBUTED | BY_NAME),
    "bf16, in buckets": ({}, DISTRIBUTED | IN_BUCKETS),
}
CARRIED = [name for name in TRAINED if "buckets" not in name]
# the first test waits for 19 saves by 33 processes: 50 s on two free cores
pytestmark = pytest.mark.timeout(600)
MOMENTS = ("exp_avg", "exp_avg_sq")
NORM = "decoder.final_layernorm.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as Megatron saved them: those of `SAVED` and `TRAINED`, and `LM`."""
    folder = tmp_path_factory.mktemp("megatron")
    cases = [case("save", folder / name, *SAVED[name]) for name in SAVED]
    cases += [case("train", folder / name, *TRAINED[name]) for name in TRAINED]
    run([*cases, case("lm_save", folder / LM, {}, {"ranks": 2, "tp": 2, "plugin": True})])
    return folder


@pytest.mark.parametrize("name", SAVED)
def test_what_megatron_core_saved_is_read_bit_by_bit(name: str, saved: Path, tmp_path: Path) -> None:
    model = model_of(SAVED[name][0])
    assert recognise(saved / name) == "torch_dist"
    done = convert(saved / name, tmp_path / "ours", "megatron", model=model)
    assert_bit_equal(read_checkpoint(tmp_path / "ours"), random_tensors(model, SEED))
    assert open_source(tmp_path / "ours").model == model
    assert "rows of padding of the vocabulary are left out" in done.notes[0]
    state = read_manifest(tmp_path / "ours")["state"]
    assert (state["step"], state["origin"]["iteration"]) == (0, ITERATION)


@pytest.mark.parametrize("name", ["untied, TP 2, layers by number", "experts, TP 2"])
def test_logits_of_a_direct_export(name: str, saved: Path, tmp_path: Path, tokens: torch.Tensor) -> None:
    model = model_of(SAVED[name][0])
    target = "granitemoe" if model.num_moe_experts else "granite"
    convert(saved / name, tmp_path / "out", target, dtype="fp32", model=model)
    expected = canonical_logits(model, random_tensors(model, SEED), tokens)
    assert_close(expected, transformers_logits(tmp_path / "out", tokens))


def test_what_megatron_lm_saved(saved: Path, tmp_path: Path) -> None:
    """Its folder with a tracker, or an iteration in it; with our plugin its arguments describe the whole model."""
    folder, model = saved / LM, model_of({})
    assert {path.name for path in folder.iterdir()} == {"iter_0000007", "latest_checkpointed_iteration.txt"}
    for number, source in enumerate((folder, folder / "iter_0000007")):
        assert recognise(source) == "torch_dist"
        convert(source, tmp_path / str(number), "megatron", model=model)
        assert_bit_equal(read_checkpoint(tmp_path / str(number)), random_tensors(model, SEED))
    assert open_source(folder).model == model


def test_an_earlier_release_keeps_the_common_state_in_a_file(saved: Path, tmp_path: Path) -> None:
    """common.pt in the place of the object among the tensors."""
    folder = shutil.copytree(saved / LM / "iter_0000007", tmp_path / "iter_0000007")
    key = "common_state/shard_0_1"
    metadata = FileSystemReader(folder).read_metadata()
    [(index, place)] = [pair for pair in metadata.storage_data.items() if pair[0].fqn == key]
    content = (folder / place.relative_path).read_bytes()[place.offset : place.offset + place.length]
    torch.save(torch.load(io.BytesIO(content), weights_only=False)[0], folder / "common.pt")
    del metadata.storage_data[index], metadata.state_dict_metadata[key]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    source = open_source(folder)
    assert source.origin["iteration"] == ITERATION and source.model.scale_emb == 12.0


def test_a_flipped_bit_is_found_by_megatrons_checksums(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "dense, TP 2", tmp_path / "saved")
    content = bytearray((folder / "__1_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "__1_0.distcp").write_bytes(content)
    with pytest.raises(UserError, match="__1_0.distcp: the checksum is not that of what was saved"):
        open_source(folder, model_of({}))


def updated(model: ModelRecipe, precision: str) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """Weights in fp32 and moments by kind, after the same updates by torch's AdamW on whole tensors."""
    rounded = torch.bfloat16 if precision == "bf16" else torch.float32
    weights = {name: tensor.to(rounded).float() for name, tensor in random_tensors(model, SEED).items()}
    # Megatron's scheduler, which there is none of here, would set the decay of norms to 0
    optimizer = torch.optim.AdamW(weights.values(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)
    for step in range(UPDATES):
        gradients = random_tensors(model, seed=100 + step)
        for name, weight in weights.items():
            weight.grad = gradients[name]
        optimizer.step()
    return weights, {kind: {name: optimizer.state[w][kind] for name, w in weights.items()} for kind in MOMENTS}


@pytest.mark.parametrize("name", CARRIED)
def test_weights_and_moments_are_adamws(name: str, saved: Path, tmp_path: Path) -> None:
    model, how = model_of(TRAINED[name][0]), TRAINED[name][1]
    done = convert(saved / name, tmp_path / "ours", "megatron", model=model)
    assert any(f"optimizer state is carried over, at step {ITERATION}" in note for note in done.notes)
    weights, moments = updated(model, how["precision"])
    assert_bit_equal(read_checkpoint(tmp_path / "ours"), weights)
    reader = CheckpointReader(tmp_path / "ours")
    for kind in MOMENTS:
        assert_bit_equal({each: reader.read(each, kind) for each in reader.names()}, moments[kind])
    assert problems(tmp_path / "ours") == []
    state = read_manifest(tmp_path / "ours")["state"]
    assert (state["step"], state["updates"]) == (ITERATION, UPDATES)
    samples = SAMPLES_A_STEP * ITERATION
    by_arguments = {"samples": samples, "tokens": samples * LENGTH}  # which Megatron-LM alone saves
    read = {key: state[key] for key in ("samples", "tokens") if key in state}
    assert read == (by_arguments if how.get("lm") else {"tokens": 0})


def test_our_trainer_goes_on_with_what_megatron_lm_trained(saved: Path, tmp_path: Path) -> None:
    """The next update follows from those before: Adam's moments, its count of updates, and the samples read."""
    name = "fp32, Megatron-LM, TP 2"
    before = tmp_path / "runs" / "imported" / "checkpoints" / f"step-{ITERATION}"
    convert(saved / name, before, "megatron", model=model_of(NANO))
    goes_on = {"folder": str(tmp_path), "step": ITERATION, "samples": SAMPLES_A_STEP, "ranks": 1}
    [[rank]] = run_forked("tests.convert.resumed:worker", [goes_on])
    assert rank.result and rank.result["status"] == 0, rank.log
    assert rank.result["samples"] == [[SAMPLES_A_STEP * ITERATION, SAMPLES_A_STEP]]
    assert rank.result["state"]["updates"] == UPDATES + 1
    old, new = CheckpointReader(before), CheckpointReader(before.with_name(f"step-{ITERATION + 1}"))
    (m, v), (next_m, next_v) = ([reader.read(NORM, kind).double() for kind in MOMENTS] for reader in (old, new))
    gradient = (next_m - BETAS[0] * m) / (1 - BETAS[0])  # one gradient explains both moments
    torch.testing.assert_close(next_v, BETAS[1] * v + (1 - BETAS[1]) * gradient**2, rtol=1e-4, atol=0)
    corrected = next_m / (1 - BETAS[0] ** (UPDATES + 1)), next_v / (1 - BETAS[1] ** (UPDATES + 1))
    step = 0.005 * corrected[0] / corrected[1].sqrt()  # nano's rate, at which a norm is updated, without decay
    torch.testing.assert_close(new.read(NORM).double(), old.read(NORM).double() - step, rtol=1e-5, atol=0)


def test_buckets_are_left_behind_in_one_line(saved: Path, tmp_path: Path) -> None:
    name, model = "bf16, in buckets", model_of({})
    done = convert(saved / name, tmp_path / "ours", "megatron", model=model)
    [line] = [note for note in done.notes if "optimizer" in note]
    assert "left behind" in line and "--dist-ckpt-optim-fully-reshardable" in line and "\n" not in line
    weights, _ = updated(model, "bf16")
    rounded = {each: tensor.bfloat16().float() for each, tensor in weights.items()}  # no fp32 weights by name either
    assert_bit_equal(read_checkpoint(tmp_path / "ours"), rounded)
    assert CheckpointReader(tmp_path / "ours").kinds(NORM) == ["param"]
    state = read_manifest(tmp_path / "ours")["state"]
    assert state["step"] == 0 and "updates" not in state


def test_a_published_format_takes_the_fp32_weights(saved: Path, tmp_path: Path) -> None:
    name, model = "bf16, distributed over DP 2", model_of({})
    done = convert(saved / name, tmp_path / "out", "granite", dtype="fp32", model=model)
    assert not any("optimizer" in note for note in done.notes)
    source = open_source(tmp_path / "out")
    weights, _ = updated(model, "bf16")
    assert_bit_equal({each: source.tensors.read(each) for each in source.tensors.names()}, weights)


def test_untying_does_not_lose_optimizer_state_silently(saved: Path, tmp_path: Path) -> None:
    model = model_of({})
    with pytest.raises(UserError, match="optimizer state would be left behind; make a checkpoint of ours of it first"):
        untie(saved / "fp32, TP 2", tmp_path / "run", model=model)
    assert not (tmp_path / "run").exists()
    convert(saved / "fp32, TP 2", tmp_path / "ours", "megatron", model=model)
    done = untie(tmp_path / "ours", tmp_path / "run")
    assert (done.step, done.has_moments) == (ITERATION, True)
    weights, _ = updated(model, "fp32")
    head = {"output_layer.weight": weights["embedding.word_embeddings.weight"]}
    assert_bit_equal(read_checkpoint(tmp_path / "run" / "checkpoints" / f"step-{ITERATION}"), weights | head)
    done = untie(saved / "bf16, in buckets", tmp_path / "alone", model=model)
    assert (done.step, done.has_moments) == (0, False) and "left behind" in done.notes[-1]
