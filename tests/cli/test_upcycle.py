"""tools/upcycle.py on whole folders: what is carried over, how much memory it takes, and what a failure leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from minicpm_megatron.checkpoint.find import find_source
from minicpm_megatron.convert import convert, open_source
from minicpm_megatron.derive.upcycle import upcycle
from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.upcycling import Upcycling, upcycle_state_dict, upcycled_model
from minicpm_megatron.recipe import build, count_parameters, load_recipe
from minicpm_megatron.storage.manifest import read_manifest
from minicpm_megatron.storage.sharded import CheckpointReader
from tests.cli.commands import command
from tests.cli.saved_run import MOMENTS, killed_in_the_middle, trained, watch_memory
from tests.convert.conftest import (
    EXPERTS,
    MakeCheckpoint,
    assert_bit_equal,
    canonical_logits,
    checkpoint,
    random_tensors,
    read_checkpoint,
    small_model,
    tokens,
)

__all__ = ["checkpoint", "tokens", "trained"]  # fixtures


def test_everything_a_run_needs_to_go_on_is_carried_over(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "moe"
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    done = upcycle(trained, run, Upcycling(copies=4, seed=3))
    assert (done.step, done.has_moments, done.has_recipe) == (30, True, True)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "recipe.yaml"]
    folder = run / "checkpoints" / "step-30"
    dense = random_tensors(small_model(num_layers=2))
    assert_bit_equal(read_checkpoint(folder), upcycle_state_dict(dense, 4, seed=3))
    state = read_manifest(folder)["state"]
    assert {key: state[key] for key in ("step", "samples", "tokens", "updates", "fault")} == {
        "step": 30,
        "samples": 240,
        "tokens": 7680,
        "updates": 29,
        "fault": None,
    }
    assert state["faults"] == {"offset": 8}  # of the data position
    assert state["rates"]["router"] == state["rates"]["expert"] == pytest.approx(0.01 / 2.4)
    options = {"copies": 4, "granularity": 1, "noise": 0.0, "router_std": 0.1, "seed": 3, "top_k": 2}
    assert state["origin"] == {
        "run": str(tmp_path / "runs" / "dense"),
        "step": 30,
        "upcycling": options | {"moments": "clone"},
    }
    assert read_manifest(folder)["data"] == {"data/train": "fingerprint"}
    recipe = load_recipe(run / "recipe.yaml")
    assert recipe.run_directory == run and recipe.model == done.model
    assert build(read_manifest(folder)["recipe"]) == recipe
    reader, old = CheckpointReader(folder), CheckpointReader(trained)
    for name in ("embedding.word_embeddings.weight", "decoder.layers.1.self_attention.linear_qkv.weight"):
        for kind in MOMENTS:
            assert torch.equal(reader.read(name, kind), old.read(name, kind))
    for rank in range(2):
        assert reader.rank_tensors(rank)["cpu"].tolist() == [rank, 7]
    assert not reader.rank_tensors(2)
    expert = "decoder.layers.1.mlp.experts.local_experts.2.linear_fc1.weight"
    torch.testing.assert_close(
        reader.read(expert, "exp_avg_sq"), old.read("decoder.layers.1.mlp.linear_fc1.weight", "exp_avg_sq") / 8
    )
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before


def test_moments_of_experts_are_zero_where_they_are_dropped(trained: Path, tmp_path: Path) -> None:
    upcycle(trained, tmp_path / "runs" / "moe", Upcycling(copies=3), moments="drop")
    reader = CheckpointReader(tmp_path / "runs" / "moe" / "checkpoints" / "step-30")
    for name in reader.names():
        for kind in MOMENTS:
            assert bool(reader.read(name, kind).any()) is not (".experts." in name or ".router." in name)


@pytest.mark.parametrize("granularity", [1, 4])
@pytest.mark.parametrize("kind", ["ours", "granite", "llama", "minicpm"])
def test_logits_are_those_of_the_dense_model(
    kind: str, granularity: int, checkpoint: MakeCheckpoint, tmp_path: Path, tokens: torch.Tensor
) -> None:
    dense = checkpoint()
    if kind != "ours":
        convert(dense, tmp_path / kind, kind, dtype="fp32")
        dense = tmp_path / kind
    done = upcycle(dense, tmp_path / "moe", Upcycling(granularity=granularity))
    assert (done.step, done.has_moments, done.has_recipe) == (0, False, False)
    source = open_source(tmp_path / "moe" / "checkpoints" / "step-0")
    assert source.model == done.model == upcycled_model(small_model(), Upcycling(granularity=granularity))
    model = small_model()
    expected = canonical_logits(model, random_tensors(model), tokens)
    found = canonical_logits(source.model, read_checkpoint(source.folder), tokens)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


def test_overrides_change_the_new_run_and_not_its_past(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "moe"
    changes = ["schedule.total=200", "model.moe_aux_loss_coeff=0.02", "parallel.expert_model_parallel_size=2"]
    upcycle(trained, run, Upcycling(), overrides=changes)
    recipe = load_recipe(run / "recipe.yaml")
    assert (recipe.schedule.total, recipe.model.moe_aux_loss_coeff) == (200, 0.02)
    assert recipe.parallel.expert_model_parallel_size == 2
    for change, message in (
        ("optimizer.lr=0.02", "optimizer.lr: was 0.01 in the 30 steps already done"),
        ("training.global_batch_size=16", "training.global_batch_size"),
        ("model.num_moe_experts=4", "model.num_moe_experts: upcycling makes it 8, not 4; use --experts"),
        ("model.hidden_size=48", "model.hidden_size"),
        ("name=other", "would make the run"),
        ("schedule.totall=3", "totall"),
    ):
        with pytest.raises(UserError, match=message):
            upcycle(trained, tmp_path / "runs" / "again", Upcycling(), overrides=[change])
        assert not (tmp_path / "runs" / "again").exists()


def test_memory_is_that_of_a_tensor_and_not_of_the_model(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = checkpoint(num_layers=24)
    peaks = watch_memory(monkeypatch)
    done = upcycle(dense, tmp_path / "moe", Upcycling(noise=0.01))
    whole = 4 * count_parameters(done.model).total
    layer = 8 * 4 * 3 * 96 * 240
    assert len(peaks) == 24 * 6 + 2 and whole > 50e6
    # the copies of one matrix, each with its noise, are two thirds of a layer
    assert layer / 2 < max(peaks) < layer and max(peaks) < whole / 20


def test_a_kill_in_the_middle_leaves_no_run(trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "runs" / "moe"
    arguments = ("--input", trained.parents[1], "--output", run, "--experts", 4)
    assert killed_in_the_middle("upcycle.py", *arguments) == -9 and not run.exists()
    assert command("upcycle.py", *arguments) == 0
    output = capfd.readouterr()
    count = count_parameters(upcycled_model(small_model(num_layers=2), Upcycling(copies=4)))
    assert f"step 30: 4 experts, 2 a token; {count.total:,} parameters" in output.out
    assert f"--recipe {run / 'recipe.yaml'}" in output.out and output.err == ""
    assert sorted(path.name for path in run.parent.iterdir()) == ["dense", "moe"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--input", "nowhere"), "nowhere: no such folder"),
        (("--input", "nowhere@3"), "no run 'nowhere' with checkpoints"),
        (("--granularity", "7"), "--granularity: 7 does not divide the MLP's width 240; give a divisor of 240"),
        (("--top-k", "9"), "--top-k: 9 of 8 copies a token"),
        (("--experts", "1"), "--experts: a mixture has 2 experts or more"),
        (("--output", "{occupied}"), "exists already; give another --output"),
        (("--output", "{file}/moe"), "cannot be written"),
        (("--input", "{mixture}"), "a mixture of 5 experts already; give a dense model"),
        (("schedule.warmup=3",), "schedule: would have given step"),
        (("--input", "{plain}", "schedule.total=3"), "not saved by a run, so there is no recipe to change"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_bad_input_is_one_line(
    options: tuple[str, ...],
    message: str,
    trained: Path,
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "occupied").mkdir()
    (tmp_path / "file").write_text("x")
    places = {name: tmp_path / name for name in ("occupied", "file")}
    if any("{mixture}" in option for option in options):
        places["mixture"] = checkpoint("mixture", **EXPERTS)
    if any("{plain}" in option for option in options):
        places["plain"] = checkpoint("plain")
    given = ["--input", str(trained), "--output", str(tmp_path / "out")]
    before = sorted(tmp_path.rglob("*"))
    assert command("upcycle.py", *given, *(option.format(**places) for option in options)) == 2
    output = capfd.readouterr()
    assert output.out == "" and output.err.startswith("error: ")
    assert message in output.err and output.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_checkpoint_is_refused(trained: Path, tmp_path: Path) -> None:
    file = trained / "rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="the checkpoint is damaged"):
        upcycle(trained, tmp_path / "moe", Upcycling())
    assert not (tmp_path / "moe").exists()


def test_a_run_at_a_step_is_found(trained: Path) -> None:
    assert find_source(f"{trained.parents[1]}@30") == find_source(str(trained.parents[1])) == trained
    assert json.loads((find_source(str(trained)) / "manifest.json").read_text())["step"] == 30
