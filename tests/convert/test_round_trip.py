"""Out and back: every bit where the format holds the weights as they are, to rounding where it folds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minicpm_megatron.convert import FORMATS, convert, open_source
from tests.convert.conftest import (
    CASES,
    EXPERTS,
    MakeCheckpoint,
    assert_bit_equal,
    canonical_logits,
    named,
    random_tensors,
    read_checkpoint,
    small_model,
)

UNFOLDED = pytest.mark.parametrize(**named([case for case in CASES if not FORMATS[case[0]].folds]))
FOLDED = pytest.mark.parametrize(**named([case for case in CASES if FORMATS[case[0]].folds]))
TIES = pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])


@TIES
@UNFOLDED
def test_fp32_is_bit_equal_and_the_model_is_the_same(
    target: str, kind: dict[str, Any], untied: bool, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    unsaid = {"moe_aux_loss_coeff": 0.003, "moe_z_loss_coeff": 1e-3, "moe_router_load_balancing_type": "aux_loss"}
    model = small_model(
        untie_embeddings_and_output_weights=untied,
        embedding_role="matrix",
        init_method_std=0.07,
        **(kind | unsaid if kind else {}),
    )
    folder = checkpoint(**model.model_dump())
    convert(folder, tmp_path / "out", target, dtype="fp32")
    convert(tmp_path / "out", tmp_path / "back", "megatron")
    assert_bit_equal(random_tensors(model), read_checkpoint(tmp_path / "back"))
    assert open_source(tmp_path / "back").model == model


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@UNFOLDED
def test_half_precision_is_bit_equal_after_the_first_rounding(
    target: str, kind: dict[str, Any], dtype: str, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    convert(checkpoint(**kind), tmp_path / "out", target, dtype=dtype)
    convert(tmp_path / "out", tmp_path / "back", "megatron")
    rounded = {
        name: tensor.to({"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]).float()
        for name, tensor in random_tensors(small_model(**kind)).items()
    }
    assert_bit_equal(rounded, read_checkpoint(tmp_path / "back"))
    convert(tmp_path / "back", tmp_path / "again", target, dtype=dtype)
    assert_bit_equal(
        load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    )


@TIES
@FOLDED
def test_our_own_folded_export_unfolds(
    target: str, kind: dict[str, Any], untied: bool, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    model = small_model(untie_embeddings_and_output_weights=untied, **kind)
    convert(checkpoint(**model.model_dump()), tmp_path / "out", target, dtype="fp32")
    convert(tmp_path / "out", tmp_path / "back", "megatron")
    assert open_source(tmp_path / "back").model == model
    back = read_checkpoint(tmp_path / "back")
    expected = random_tensors(model)
    assert set(back) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(back[name], tensor, rtol=4e-7, atol=0.0, msg=name)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@FOLDED
def test_a_folded_export_in_half_precision_is_still_known_to_be_tied(
    target: str, kind: dict[str, Any], dtype: str, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    convert(checkpoint(**kind), tmp_path / "out", target, dtype=dtype)
    assert open_source(tmp_path / "out").model == small_model(**kind)


@FOLDED
def test_folds_by_powers_of_two_come_back_in_every_bit(
    target: str, kind: dict[str, Any], checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    exact = {"num_layers": 4, "scale_emb": 8.0, "scale_depth": 0.5, "hidden_size": 96, "dim_model_base": 24} | kind
    convert(checkpoint(**exact), tmp_path / "out", target, dtype="bf16")
    convert(tmp_path / "out", tmp_path / "back", "megatron")
    rounded = {name: t.bfloat16().float() for name, t in random_tensors(small_model(**exact)).items()}
    assert_bit_equal(rounded, read_checkpoint(tmp_path / "back"))


def test_somebody_elses_llama_keeps_its_weights_and_gets_multipliers_of_one(
    tmp_path: Path, tokens: torch.Tensor
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=400,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        )
    )
    theirs.save_pretrained(tmp_path / "llama")
    convert(tmp_path / "llama", tmp_path / "ours", "megatron")
    source = open_source(tmp_path / "ours")
    assert (source.model.scale_emb, source.model.dim_model_base) == (1.0, 64)
    assert source.model.rotary_base == 50000.0
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
    actual = canonical_logits(source.model, read_checkpoint(tmp_path / "ours"), tokens)
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()
    convert(tmp_path / "ours", tmp_path / "again", "llama", dtype="fp32")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert_bit_equal({name: t.detach() for name, t in theirs.state_dict().items()}, again)


@pytest.mark.parametrize("tied", [True, False])
def test_somebody_elses_granite(tied: bool, tmp_path: Path, tokens: torch.Tensor) -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    theirs = GraniteForCausalLM(
        GraniteConfig(
            vocab_size=400,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            embedding_multiplier=6.0,
            residual_multiplier=0.22,
            logits_scaling=2.0,
            attention_multiplier=0.25,
            tie_word_embeddings=tied,
        )
    )
    theirs.save_pretrained(tmp_path / "granite")
    convert(tmp_path / "granite", tmp_path / "ours", "megatron")
    source = open_source(tmp_path / "ours")
    assert source.model.untie_embeddings_and_output_weights is not tied
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
    actual = canonical_logits(source.model, read_checkpoint(tmp_path / "ours"), tokens)
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()


def somebody_elses_mixture(kind: str) -> Any:
    """A model of transformers with random weights."""
    from transformers import GraniteMoeConfig, GraniteMoeForCausalLM, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=6,
        num_experts_per_tok=3,
        initializer_range=0.2,
    )
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**shape))
    own = dict(embedding_multiplier=6.0, residual_multiplier=0.22, logits_scaling=2.0, attention_multiplier=0.25)
    return GraniteMoeForCausalLM(GraniteMoeConfig(**shape, **own))


@pytest.mark.parametrize("kind", ["mixtral", "granitemoe"])
def test_somebody_elses_mixture(kind: str, tmp_path: Path, tokens: torch.Tensor) -> None:
    theirs = somebody_elses_mixture(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", "megatron")
    source = open_source(tmp_path / "ours")
    assert (source.model.num_moe_experts, source.model.moe_router_topk, source.model.moe_ffn_hidden_size) == (6, 3, 48)
    assert source.model.scale_emb == (1.0 if kind == "mixtral" else 6.0)
    assert source.model.rotary_base == (1e6 if kind == "mixtral" else 1e4)  # each configuration's own default
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
    actual = canonical_logits(source.model, read_checkpoint(tmp_path / "ours"), tokens)
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()
    convert(tmp_path / "ours", tmp_path / "again", kind, dtype="fp32")
    again, first = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "theirs"))
    assert_bit_equal(first, again)


def test_a_mixture_from_one_published_format_to_another(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    convert(checkpoint(**EXPERTS), tmp_path / "direct", "minicpm", dtype="fp32")
    for middle, rtol in (("granitemoe", 0.0), ("mixtral", 4e-7)):
        convert(tmp_path / "direct", tmp_path / middle, middle, dtype="fp32")
        convert(tmp_path / middle, tmp_path / "final", "minicpm", dtype="fp32", overwrite=True)
        direct, final = (load_file(tmp_path / name / "model.safetensors") for name in ("direct", "final"))
        for name, tensor in direct.items():
            torch.testing.assert_close(final[name], tensor, rtol=rtol, atol=0.0)


def test_the_published_names_of_a_mixture(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The names and keys of the released 8x2B."""
    convert(checkpoint(**EXPERTS), tmp_path / "out", "minicpm", dtype="fp32")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["MiniCPMForCausalLM"] and config["model_type"] == "minicpm"
    assert (config["num_experts"], config["num_experts_per_tok"], config["intermediate_size"]) == (5, 2, 72)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    names = {name for name in weights if name.startswith("model.layers.5.mlp.")}
    experts = {f"model.layers.5.mlp.experts.{e}.{w}.weight" for e in range(5) for w in ("w1", "w2", "w3")}
    assert names == {"model.layers.5.mlp.gate.weight"} | experts
    assert tuple(weights["model.layers.5.mlp.experts.4.w1.weight"].shape) == (72, 96)


@pytest.mark.parametrize("middle", ["llama", "granite"])
def test_from_one_published_format_to_another(middle: str, checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = checkpoint()
    convert(folder, tmp_path / "direct", "minicpm", dtype="fp32")
    convert(folder, tmp_path / "middle", middle, dtype="fp32")
    convert(tmp_path / "middle", tmp_path / "final", "minicpm", dtype="fp32")
    direct, final = (load_file(tmp_path / name / "model.safetensors") for name in ("direct", "final"))
    for name, tensor in direct.items():
        torch.testing.assert_close(final[name], tensor, rtol=4e-7 if middle == "llama" else 0.0, atol=0.0)


def test_a_head_that_starts_as_a_copy_stays_a_head(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The 128K model: untied, its head copied from the embedding at the start."""
    model = small_model(untie_embeddings_and_output_weights=True)
    tensors = random_tensors(model)
    tensors["output_layer.weight"] = tensors["embedding.word_embeddings.weight"].clone()
    convert(checkpoint(tensors=tensors, **model.model_dump()), tmp_path / "out", "minicpm", dtype="fp32")
    convert(tmp_path / "out", tmp_path / "back", "megatron")
    assert_bit_equal(tensors, read_checkpoint(tmp_path / "back"))


@pytest.mark.parametrize("target", ["minicpm", "llama"])
def test_a_tied_export_whose_head_was_trained_since_imports_untied(
    target: str, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    convert(checkpoint(), tmp_path / "out", target, dtype="fp32")
    file = tmp_path / "out" / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"][7] *= 1.5
    save_file(weights, file)
    done = convert(tmp_path / "out", tmp_path / "back", "megatron")
    assert any("exported as a tied model" in note and "comes back untied" in note for note in done.notes)
    assert open_source(tmp_path / "back").model.untie_embeddings_and_output_weights
    back = read_checkpoint(tmp_path / "back")
    expected = random_tensors(small_model())["embedding.word_embeddings.weight"][7] * 1.5
    torch.testing.assert_close(back["output_layer.weight"][7], expected)


def test_a_configuration_edited_by_hand_is_right_against_the_note(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    convert(checkpoint(), tmp_path / "out", "granite", dtype="fp32")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"embedding_multiplier": 5.0}))
    assert open_source(tmp_path / "out").model.scale_emb == 5.0


def test_the_published_configuration_without_a_tie_key_is_tied(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The published 2B: no tie_word_embeddings, no lm_head, auto_map to code that is not there."""
    convert(checkpoint(), tmp_path / "out", "minicpm", dtype="fp32")
    path, file = tmp_path / "out" / "config.json", tmp_path / "out" / "model.safetensors"
    config = json.loads(path.read_text())
    for key in ("tie_word_embeddings", "minicpm_megatron", "rope_parameters", "rope_theta", "rope_scaling"):
        del config[key]
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM"}
    path.write_text(json.dumps(config))
    weights = load_file(file)
    del weights["lm_head.weight"]
    save_file(weights, file)
    (tmp_path / "out" / "model.safetensors.index.json").unlink()
    (tmp_path / "out" / "modeling_minicpm.py").write_text("raise SystemExit('executed')")
    convert(tmp_path / "out", tmp_path / "back", "megatron")
    assert_bit_equal(random_tensors(small_model()), read_checkpoint(tmp_path / "back"))
    assert open_source(tmp_path / "back").model == small_model()
