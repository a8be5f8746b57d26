"""Folders that are refused, each with one line that names the place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minicpm_megatron.convert import convert, open_source, recognise
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.sharded import write_single
from tests.convert.conftest import EXPERTS, MakeCheckpoint, random_tensors, small_model


@pytest.fixture
def folder(checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A sound untied granite folder of several shards."""
    convert(
        checkpoint(untie_embeddings_and_output_weights=True),
        tmp_path / "granite",
        "granite",
        dtype="fp32",
        max_shard_size="500KB",
    )
    return tmp_path / "granite"


def edit(folder: Path, file: str = "config.json", **changes: Any) -> None:
    """Change keys of a JSON file; None removes."""
    path = folder / file
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Replace the weights by one file without an index, after `change`."""
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
        path.unlink()
    change(weights)
    save_file(weights, folder / "model.safetensors")
    (folder / "model.safetensors.index.json").unlink()


def test_the_fixture_is_accepted(folder: Path) -> None:
    assert recognise(folder) == "granite"
    open_source(folder)
    rewrite(folder, lambda weights: None)
    open_source(folder)


DYNAMIC: dict[str, Any] = {"rope_parameters": None}  # leaves the older key alone to say it
CONFIG_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    "attention bias": ({"attention_bias": True}, "attention_bias True is not supported"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias True is not supported"),
    "scaled rope, old key": ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling .* not supported"),
    "kind of rope is no word": (
        {"rope_scaling": {"type": ["dynamic"], "factor": 4.0}},
        "rope_scaling .* not supported",
    ),
    "two scalings": (
        {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
        "rope_parameters .*default.* and rope_scaling .*dynamic.* differ",
    ),
    "dynamic without factor": (DYNAMIC | {"rope_parameters": {"rope_type": "dynamic"}}, "factor is missing"),
    "dynamic with a factor below 1": (DYNAMIC | {"rope_scaling": {"type": "dynamic", "factor": 0.5}}, "0.5 is refused"),
    "dynamic with alpha": (
        DYNAMIC | {"rope_scaling": {"type": "dynamic", "factor": 4.0, "alpha": 1e3}},
        "not supported: alpha",
    ),
    "dynamic that begins elsewhere": (
        DYNAMIC | {"rope_scaling": {"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 64}},
        "begins at 64 and max_position_embeddings is 128",
    ),
    "scaled rope, new key": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
        "rope_parameters .* not supported",
    ),
    "partial rope": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 1e4}},
        "rope_parameters .* not supported",
    ),
    "rope is no object": ({"rope_scaling": "linear"}, "rope_scaling 'linear' is not supported"),
    "two bases": ({"rope_theta": 5e5}, "two different values of rope_theta"),
    "experts": ({"num_local_experts": 8}, "num_local_experts is set; granite holds dense models only"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
    "missing size": ({"hidden_size": None}, "hidden_size missing"),
    "size of another type": ({"num_hidden_layers": "six"}, "num_layers.*six"),
    "negative size": ({"vocab_size": -1}, "vocab_size.*-1"),
    "heads": ({"num_key_value_heads": 3}, "8 attention heads do not divide into 3"),
    "tie": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
    "epsilon": ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number"),
    "attention multiplier": ({"attention_multiplier": 1.0}, r"attention_multiplier 1.0 is not 1/sqrt\(12\)"),
    "logits scaling": ({"logits_scaling": 0.37}, "logits_scaling 0.37 does not divide"),
    "logits scaling zero": ({"logits_scaling": 0}, "logits_scaling 0.0 does not divide"),
    "note": ({"minicpm_megatron": {"scale_emb": "twelve"}}, "minicpm_megatron.*scale_emb.*twelve"),
    "tied, and yet a head": ({"tie_word_embeddings": True}, "lm_head.weight differs from model.embed_tokens.weight"),
    "other widths": ({"intermediate_size": 120}, r"gate_proj.weight has shape \[240, 96\], .* says \[120, 96\]"),
    "fewer layers": ({"num_hidden_layers": 5}, r"unexpected tensor model\.layers\.5\."),
    "sparse attention": (
        {"sparse_config": {"kernel_size": 32, "topk": 64, "dense_len": 8192}},
        "sparse_config .* is not supported .sparse attention",
    ),
    "window": ({"sliding_window": 64}, "sliding_window 64 is not supported"),
    "longrope": (
        {"rope_scaling": {"rope_type": "longrope", "long_factor": [1.25] * 64, "short_factor": [1.0] * 64}},
        r"rope_scaling {'rope_type': 'longrope'.{60,80}\.\.\. is not supported",
    ),
    "window in some layers": (
        {"layer_types": ["full_attention", "sliding_attention"] * 3},
        "layer_types .* is not supported",
    ),
    "partial rope, as a key of its own": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    "capped logits": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not supported"),
    "norm of queries": ({"use_qk_norm": True}, "use_qk_norm True is not supported"),
    "layers without rope": ({"no_rope_layers": [1, 1, 0, 1, 1, 1]}, "no_rope_layers .* is not supported"),
    "another depth": ({"mup_denominator": 32}, "mup_denominator 32 is not supported"),
    "an infinite factor": ({"embedding_multiplier": float("inf")}, "embedding_multiplier must be a finite number"),
    "a factor that is no number": ({"residual_multiplier": float("nan")}, "residual_multiplier must be a finite"),
    "an endless factor": ({"embedding_multiplier": 10**400}, "embedding_multiplier is a number of 401 digits"),
    "a note of a later release": ({"minicpm_megatron": {"new": 1}}, "minicpm_megatron: unknown key new; a later"),
    "a million layers": ({"num_hidden_layers": 10**6}, "num_hidden_layers says 1000000, and the folder has 57 tensors"),
    "layers beyond counting": ({"num_hidden_layers": 10**400}, "num_hidden_layers is a number of 401 digits"),
    "more layers": ({"num_hidden_layers": 7}, r"tensor model\.layers\.6\.input_layernorm\.weight and 8 more missing"),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_configuration(fault: str, folder: Path) -> None:
    changes, message = CONFIG_FAULTS[fault]
    edit(folder, **changes)
    with pytest.raises(UserError, match=message) as caught:
        open_source(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


EXPERT_FAULTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no experts": ("mixtral", {"num_local_experts": None}, "num_local_experts is missing"),
    "another key": ("granitemoe", {"num_experts": 5}, "num_experts is set; granitemoe holds num_local_experts"),
    "none a token": ("mixtral", {"num_experts_per_tok": None}, "num_experts_per_tok is missing"),
    "too many a token": ("mixtral", {"num_experts_per_tok": 9}, "9 experts a token of only 5"),
    "experts of another type": ("granitemoe", {"num_local_experts": "5"}, "num_moe_experts.*'5'"),
    "more experts than tensors": (
        "minicpm",
        {"num_experts": 6},
        r"tensor .*experts\.5\.w1\.weight and \d+ more missing",
    ),
    "fewer experts than tensors": ("minicpm", {"num_experts": 4}, r"gate\.weight has shape|unexpected tensor"),
    "dense": ("minicpm", {"num_experts": None}, r"tensor .*mlp\.gate_proj\.weight and \d+ more missing"),
    "stacked otherwise": ("granitemoe", {"num_local_experts": 4}, r"shape \[5, .*says \[4,"),
    "window": ("mixtral", {"sliding_window": 64}, "sliding_window 64 is not supported"),
    # Mixtral has no switch, and takes the length as it is
    "window with a switch": ("mixtral", {"sliding_window": 64, "use_sliding_window": False}, "sliding_window 64 is"),
    "a million experts": (
        "minicpm",
        {"num_experts": 10**6},
        r"num_experts says 1000000, and .*gate.weight has rows for 5",
    ),
    "a million stacked": ("granitemoe", {"num_local_experts": 10**6}, "num_local_experts says 1000000, and .* for 5"),
    "weights that do not sum to 1": ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob False is not supported"),
    "shared experts": ("minicpm", {"n_shared_experts": 1}, "n_shared_experts 1 is not supported"),
}


@pytest.mark.parametrize("case", EXPERT_FAULTS)
def test_mixtures(case: str, checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    target, changes, message = EXPERT_FAULTS[case]
    convert(checkpoint(**EXPERTS), tmp_path / "out", target)
    edit(tmp_path / "out", **changes)
    with pytest.raises(UserError, match=message) as caught:
        open_source(tmp_path / "out")
    assert str(tmp_path / "out") in str(caught.value) and "\n" not in str(caught.value)


def test_keys_that_leave_the_result_as_it_is(folder: Path) -> None:
    edit(
        folder,
        sparse_config=None,
        sliding_window=4096,
        use_sliding_window=False,
        layer_types=["full_attention"] * 6,
        partial_rotary_factor=1.0,
        mup_denominator=6,
        pretraining_tp=1,
        transformers_version="5.23.0",
        somebodys_own_key={"a": 1},
    )
    open_source(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "model.layers.3.mlp.up_proj.weight"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_are_not_finite(
    tied: bool, name: str, value: float, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """A NaN differs from itself: in the embedding of a tied model it must not pass for a head of its own."""
    folder = tmp_path / "minicpm"
    convert(checkpoint(untie_embeddings_and_output_weights=not tied), folder, "minicpm", dtype="fp32")

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights[name][7, 5] = value
        if tied and name != "model.layers.3.mlp.up_proj.weight":
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"] = weights[name].clone()
            weights["lm_head.weight"] = weights[name].clone()

    rewrite(folder, spoil)
    with pytest.raises(UserError, match="tensor .* has values that are not finite") as caught:
        convert(folder, tmp_path / "kept", "megatron")
    assert "model.safetensors" in str(caught.value) and not (tmp_path / "kept").exists()


def test_a_checkpoint_of_ours_that_is_not_finite(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    tensors = random_tensors(small_model())
    tensors["decoder.layers.2.mlp.linear_fc2.weight"][0, 0] = float("nan")
    for target in ("megatron", "torch_dist", "llama"):
        with pytest.raises(UserError, match="not finite"):
            convert(checkpoint(target, tensors=tensors), tmp_path / f"{target}-out", target)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "None is no mapping"),
        ([], r"\[\] is no mapping"),
        ("minicpm-1.2b", "'minicpm-1.2b' is no mapping"),
        ({}, "missing"),
        (
            small_model().model_dump(mode="json") | {"num_layers": 10**6},
            "layers and experts are 1000000 in all, for 38 tensors",
        ),
    ],
    ids=["null", "list", "word", "empty", "a million layers"],
)
def test_the_model_of_a_manifest(model: Any, message: str, tmp_path: Path) -> None:
    """Its checksum is right: whoever forges a manifest writes that, too."""
    write_single(tmp_path / "ours", random_tensors(small_model()).items(), model, {"step": 0, "tokens": 0})
    with pytest.raises(UserError, match=message) as caught:
        convert(tmp_path / "ours", tmp_path / "out", "llama")
    assert "manifest.json" in str(caught.value) and "\n" not in str(caught.value)


def test_the_texts_of_a_manifest(tmp_path: Path) -> None:
    for number, text in enumerate((3, [], {"generation_config": 3}, {"eos_token_id": "x"})):
        folder, model = tmp_path / str(number), small_model().model_dump(mode="json")
        write_single(folder, random_tensors(small_model()).items(), model, {"step": 0, "tokens": 0, "text": text})
        with pytest.raises(UserError, match="text is malformed|'x' is no id"):
            open_source(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 200_000, b"\xff\xfe{"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_malformed_json(file: str, text: str | bytes, folder: Path) -> None:
    (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=f"{file}: not "):
        open_source(folder)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/secret.safetensors", "a/../../x.safetensors", "..\\x.safetensors",
             "weights.bin", "", None, 7, ["a"], "..", "x\0.safetensors"],
)  # fmt: skip
def test_an_index_that_leads_elsewhere(name: Any, folder: Path) -> None:
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    weight_map["model.norm.weight"] = name
    edit(folder, "model.safetensors.index.json", weight_map=weight_map)
    with pytest.raises(UserError, match="weight_map names .*, not a .safetensors file of this folder"):
        open_source(folder)


def test_shards(folder: Path) -> None:
    shards = sorted(folder.glob("*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-10])
    with pytest.raises(UserError, match=f"{shards[1].name}: not a whole safetensors file"):
        open_source(folder)
    shards[1].write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match=f"{shards[1].name}: not a whole safetensors file"):
        open_source(folder)
    shards[1].unlink()
    with pytest.raises(UserError, match=f"{shards[1].name}: missing; download it again"):
        open_source(folder)
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(UserError, match=f"{shards[1].name}: tensor .* is listed in the index and not in the file"):
        open_source(folder)


def test_a_tensor_that_no_index_lists(folder: Path) -> None:
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    del weight_map["model.norm.weight"]
    edit(folder, "model.safetensors.index.json", weight_map=weight_map)
    with pytest.raises(UserError, match="tensor model.norm.weight is in the file and not in the index"):
        open_source(folder)


def test_an_untied_model_without_a_head(folder: Path) -> None:
    def without_head(weights: dict[str, torch.Tensor]) -> None:
        del weights["lm_head.weight"]

    rewrite(folder, without_head)
    with pytest.raises(UserError, match="tensor lm_head.weight missing"):
        open_source(folder)


def test_a_bias(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(96)}))
    with pytest.raises(UserError, match="unexpected tensor model.layers.0.self_attn.q_proj.bias"):
        open_source(folder)


def test_the_rotary_table_of_old_exports_is_no_weight(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}))
    open_source(folder)


def test_quantised_weights(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(96, dtype=torch.int8)}))
    with pytest.raises(UserError, match="model.norm.weight is stored as I8"):
        open_source(folder)


@pytest.mark.parametrize("name", ["consolidated.pth", "model.pt"])
def test_pickled_weights_are_not_read(name: str, folder: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(folder / "exploded"),)

    for path in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        path.unlink()
    torch.save({"model.norm.weight": Bomb()}, folder / name)
    with pytest.raises(UserError, match=f"weights only as {name}, which is neither safetensors nor pytorch_model.bin"):
        open_source(folder)
    assert not (folder / "exploded").exists()
    (folder / name).unlink()
    with pytest.raises(UserError, match="neither model.safetensors.index.json nor model.safetensors"):
        open_source(folder)


def test_a_model_known_only_to_its_own_code(folder: Path) -> None:
    edit(folder, model_type="own", architectures=["Own"], auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    (folder / "modeling_own.py").write_text("raise SystemExit('executed')")
    with pytest.raises(UserError, match="known only to code inside the folder, which is never run"):
        open_source(folder)


@pytest.mark.parametrize(
    "changes", [{"model_type": "minicpm3"}, {"architectures": ["GraniteForSequenceClassification"]}, {"model_type": 3}]
)
def test_other_models(changes: dict[str, Any], folder: Path) -> None:
    edit(folder, **changes)
    with pytest.raises(UserError, match="is no known format; known are minicpm"):
        open_source(folder)


def test_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        recognise(tmp_path / "absent")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="so not a model; give one of the checkpoints in"):
        recognise(tmp_path / "run")


@pytest.mark.parametrize("what", ["missing", "unexpected", "shape"])
def test_a_checkpoint_that_does_not_fit_its_model(what: str, checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    tensors = random_tensors(small_model())
    match what:
        case "missing":
            del tensors["decoder.final_layernorm.weight"]
            message = "tensor decoder.final_layernorm.weight missing"
        case "unexpected":
            tensors["output_layer.weight"] = torch.zeros(400, 96)
            message = "tensor output_layer.weight unexpected"
        case _:
            tensors["decoder.final_layernorm.weight"] = torch.ones(95)
            message = r"shape \[95\], the model says \[96\]"
    with pytest.raises(UserError, match=message):
        convert(checkpoint(tensors=tensors), tmp_path / "out", "llama")
    assert not (tmp_path / "out").exists()


def test_models_that_a_format_cannot_hold(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    wide = checkpoint("wide", kv_channels=16)
    with pytest.raises(UserError, match="no field for the head width"):
        convert(wide, tmp_path / "out", "minicpm")
    odd = checkpoint("odd", hidden_size=100, kv_channels=12)
    with pytest.raises(UserError, match="not a multiple of 8 heads"):
        convert(odd, tmp_path / "out", "llama")


def test_options(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    ours = checkpoint()
    with pytest.raises(UserError, match="--to: unknown format 'gguf'"):
        convert(ours, tmp_path / "out", "gguf")
    with pytest.raises(UserError, match="--dtype: unknown type 'int4'"):
        convert(ours, tmp_path / "out", "llama", dtype="int4")
    with pytest.raises(UserError, match="--dtype: checkpoints always hold fp32"):
        convert(ours, tmp_path / "out", "megatron", dtype="bf16")
    with pytest.raises(UserError, match="no such tokenizer folder"):
        convert(ours, tmp_path / "out", "llama", tokenizer=tmp_path / "absent")


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
def test_a_broken_tokenizer(file: str, checkpoint: MakeCheckpoint, tmp_path: Path, tokenizer: Path) -> None:
    broken = tmp_path / "tokenizer"
    broken.mkdir()
    for path in tokenizer.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / file).write_bytes(b"\x00garbage")
    with pytest.raises(UserError, match=f"{file}: not a"):
        convert(checkpoint(), tmp_path / "out", "llama", tokenizer=broken)
