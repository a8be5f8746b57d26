"""Torch_dist checkpoints that we wrote: loaded by Megatron-Core's dist_checkpointing and by Megatron-LM, and back."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minicpm_megatron.convert import convert, open_source
from minicpm_megatron.convert.source import Source
from minicpm_megatron.convert.torch_dist import write
from minicpm_megatron.convert.torch_dist.architecture import args_of_model, check_args, model_of_args
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.sharded import write_single
from tests.convert.conftest import (
    MakeCheckpoint,
    assert_bit_equal,
    canonical_logits,
    random_tensors,
    read_checkpoint,
    small_model,
)
from tests.convert.megatron_cases import EXPERTS, SEED, UNTIED, case, model_of, run
from tests.convert.test_command import tool
from tests.convert.test_logits import assert_close

MODELS: dict[str, dict[str, Any]] = {"dense": {}, "untied": UNTIED, "experts": EXPERTS}
# name, a key of MODELS first -> how it is loaded
LOADED: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense, TP 2": {"ranks": 2, "tp": 2},
    "dense, PP 2": {"ranks": 2, "pp": 2},
    "dense, GPTModel": {"plain": True},
    "untied": {},
    "untied, TP 2": {"ranks": 2, "tp": 2},
    "experts": {},
    "experts, TP 2": {"ranks": 2, "tp": 2},
    "experts, EP 2": {"ranks": 2, "ep": 2},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAME, a folder of Megatron-LM's, and NAME-ours, the checkpoint that it was made of, for each of `MODELS`."""
    folder = tmp_path_factory.mktemp("ours")
    for name, fields in MODELS.items():
        model = model_of(fields)
        tensors = random_tensors(model, SEED).items()
        write_single(folder / f"{name}-ours", tensors, model.model_dump(mode="json"), {"step": 30, "tokens": 0})
        convert(folder / f"{name}-ours", folder / name, "torch_dist")
    return folder


def test_megatron_loads_it(written: Path, tmp_path: Path, tokens: torch.Tensor) -> None:
    """Every key that Megatron asks for and no other, every bit of the weights, zeros as padding, the right logits."""
    alone = [name for name, how in LOADED.items() if how.get("ranks", 1) == 1]
    cases = []
    for name, how in LOADED.items():
        kind = name.split(",")[0]
        logits = {"logits": str(tmp_path / name), "tokens": tokens.tolist()} if name in alone else {}
        cases.append(case("load", written / kind / "release", MODELS[kind], how | logits))
    cases += [case("lm_load", written / "dense", {}, {"ranks": tp, "tp": tp}) for tp in (1, 2)]
    *loaded, first, second = run(cases)
    assert {name: ranks for name, ranks in zip(LOADED, loaded, strict=True) if any(ranks)} == {}
    for each in (*first, *second):  # Megatron-LM's load_checkpoint
        assert each == {"iteration": 0, "samples": 0, "wrong": []}
    for name in alone:
        model = model_of(MODELS[name.split(",")[0]])
        expected = canonical_logits(model, random_tensors(model, SEED), tokens)
        assert_close(expected, load_file(tmp_path / name)["logits"])


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name: str, written: Path, tmp_path: Path) -> None:
    """Every bit and the whole model, without being told which."""
    convert(written / name, tmp_path / "back", "megatron")
    assert_bit_equal(read_checkpoint(tmp_path / "back"), read_checkpoint(written / f"{name}-ours"))
    assert open_source(tmp_path / "back").model == open_source(written / f"{name}-ours").model
    convert(written / name, tmp_path / "half", "torch_dist", dtype="bf16")
    convert(tmp_path / "half", tmp_path / "rounded", "megatron")
    rounded = {n: t.bfloat16().float() for n, t in read_checkpoint(tmp_path / "back").items()}
    assert_bit_equal(read_checkpoint(tmp_path / "rounded"), rounded)


@pytest.mark.parametrize(
    "fields", [{}, UNTIED, EXPERTS, {"num_query_groups": 8, "parametrization": "standard"}], ids=str
)
def test_arguments_describe_the_model_and_no_other(fields: dict[str, Any]) -> None:
    """For each argument that changes logits, another value is refused by name."""
    model = model_of(fields)
    args = args_of_model(model)
    check_args(args, model, "here")
    assert model_of_args(args, "here") == model
    free = {"max_position_embeddings", "init_method_std", "num_query_groups", "group_query_attention"}
    free |= {"embedding_role", "moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_z_loss_coeff"}
    free |= {"minicpm_rope_scaling_type", "minicpm_rope_scaling_factor"}
    free |= {"add_bias_linear", "add_qkv_bias", "attention_dropout", "hidden_dropout"}  # biases would be tensors
    free |= set() if model.num_moe_experts else {"moe_ffn_hidden_size"}
    for argument, value in args.items():
        other = not value if isinstance(value, bool) else 3 if not isinstance(value, float) else value * 2
        if argument not in free:
            with pytest.raises(UserError, match=f"here: {argument} is {other!r}"):
                check_args(args | {argument: other}, model, "here")
    with pytest.raises(UserError, match="here: num_query_groups is 4 in the arguments of the checkpoint, the model s"):
        check_args(args | {"num_query_groups": 4, "group_query_attention": True}, model, "here")
    with pytest.raises(UserError, match=r"here: rope_scaling is \{'type': 'ntk', 'factor': 4.0\} in the arguments"):
        check_args(args | {"minicpm_rope_scaling_type": "ntk", "minicpm_rope_scaling_factor": 4.0}, model, "here")
    earlier = {name: value for name, value in args.items() if name != "layernorm_epsilon"} | {"norm_epsilon": 0.5}
    with pytest.raises(UserError, match="here: norm_epsilon is 0.5"):
        check_args(earlier, model, "here")


def test_nothing_of_this_machine_is_written(written: Path) -> None:
    folder = written / "dense"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    release = {f"release/{name}" for name in (".metadata", "__0_0.distcp", "metadata.json")}
    assert files == {"latest_checkpointed_iteration.txt"} | release
    for path in (folder / name for name in files):
        assert str(written).encode() not in path.read_bytes()


def test_few_tensors_are_in_memory(checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's writer keeps the last layer of each kind of tensor until the file is closed, and no more."""
    folder, peaks, read = checkpoint(), [], write.read_tensor
    tensors = random_tensors(small_model())
    before = live_bytes()

    def watched(source: Source, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name.startswith(("decoder.layers.5.", "decoder.final")):  # looking costs more than converting
            peaks.append(live_bytes() - before)
        return read(source, name, shape)

    monkeypatch.setattr(write, "read_tensor", watched)
    convert(folder, tmp_path / "out", "torch_dist")
    layer = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("decoder.layers.0."))
    whole = sum(tensor.nbytes for tensor in tensors.values())
    kept = tensors["embedding.word_embeddings.weight"].nbytes + layer
    assert kept / 2 < max(peaks) < 1.2 * kept < 0.7 * whole


def live_bytes() -> int:
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if torch.is_tensor(thing):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def test_a_failure_leaves_nothing(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    tensors = random_tensors(small_model())
    tensors["decoder.layers.5.mlp.linear_fc2.weight"][3, 3] = float("nan")
    with pytest.raises(UserError, match=r"layers\.5\.mlp\.linear_fc2\.weight has values that are not finite"):
        convert(checkpoint("broken", tensors=tensors), tmp_path / "out", "torch_dist")
    del tensors["decoder.final_layernorm.weight"]
    with pytest.raises(UserError, match=r"tensor decoder\.final_layernorm\.weight missing"):
        convert(checkpoint("less", tensors=tensors), tmp_path / "out", "torch_dist")
    assert {path.name for path in tmp_path.iterdir()} == {"broken", "less"}


def test_a_disk_that_is_full_in_the_middle(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    done = tool("--input", checkpoint(), "--output", tmp_path / "out", "--to", "torch_dist", largest_file=400_000)
    assert (done.returncode, done.stdout) == (2, "")
    assert "bytes are needed" in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_a_conversion_is_replaced_and_a_folder_that_megatron_went_on_in_is_not(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder, out = checkpoint(), tmp_path / "out"
    convert(folder, out, "torch_dist")
    with pytest.raises(UserError, match="not empty; give another one, or --overwrite"):
        convert(folder, out, "torch_dist")
    convert(folder, out, "torch_dist", overwrite=True)
    (out / "iter_0001000").mkdir()
    with pytest.raises(UserError, match="not a model"):
        convert(folder, out, "torch_dist", overwrite=True)
