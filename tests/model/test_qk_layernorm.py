"""The norm of queries and keys against transformers' Qwen3, which has the same one, and over tensor-parallel ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from minicpm_megatron import presets
from minicpm_megatron.convert import convert, open_source
from minicpm_megatron.convert.fused import split_qkv
from minicpm_megatron.convert.generation import as_granite
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import ModelRecipe, count_parameters
from minicpm_megatron.storage.sharded import write_single
from tests.convert.conftest import small_model
from tests.device import put
from tests.distributed.launch import run_on_ranks

# no multiplier that Qwen3 does not have: scale_depth / sqrt(layers) = 1
SHAPE: dict[str, Any] = {
    "qk_layernorm": True,
    "num_layers": 4,
    "scale_depth": 2.0,
    "scale_emb": 1.0,
    "parametrization": "standard",
    "untie_embeddings_and_output_weights": True,
    "vocab_size": 256,
}


def weights(model: ModelRecipe) -> dict[str, torch.Tensor]:
    """Random weights of the whole model under our names; norms that are not all ones."""
    generator = torch.Generator().manual_seed(3)
    hidden, channels, ffn = model.hidden_size, model.kv_channels, model.ffn_hidden_size
    queries, groups = model.num_attention_heads * channels, model.num_query_groups * channels
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (model.vocab_size, hidden),
        "decoder.final_layernorm.weight": (hidden,),
        "output_layer.weight": (model.vocab_size, hidden),
    }
    for number in range(model.num_layers):
        layer = f"decoder.layers.{number}."
        shapes |= {
            f"{layer}input_layernorm.weight": (hidden,),
            f"{layer}self_attention.linear_qkv.weight": (queries + 2 * groups, hidden),
            f"{layer}self_attention.q_layernorm.weight": (channels,),
            f"{layer}self_attention.k_layernorm.weight": (channels,),
            f"{layer}self_attention.linear_proj.weight": (hidden, queries),
            f"{layer}pre_mlp_layernorm.weight": (hidden,),
            f"{layer}mlp.linear_fc1.weight": (2 * ffn, hidden),
            f"{layer}mlp.linear_fc2.weight": (hidden, ffn),
        }
    return {
        name: 0.1 * torch.randn(shape, generator=generator) + (1.0 if len(shape) == 1 else 0.0)
        for name, shape in shapes.items()
    }


def qwen3(model: ModelRecipe, ours: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Stock transformers' Qwen3 with these weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        head_dim=model.kv_channels,
        rms_norm_eps=model.norm_epsilon,
        rope_theta=model.rotary_base,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    theirs = Qwen3ForCausalLM(config).eval()
    state = {
        "model.embed_tokens.weight": ours["embedding.word_embeddings.weight"],
        "model.norm.weight": ours["decoder.final_layernorm.weight"],
        "lm_head.weight": ours["output_layer.weight"],
    }
    for number in range(model.num_layers):
        source, target = f"decoder.layers.{number}.", f"model.layers.{number}."
        heads = model.num_attention_heads, model.num_query_groups, model.kv_channels
        parts = split_qkv(ours[f"{source}self_attention.linear_qkv.weight"], *heads)
        gate, up = ours[f"{source}mlp.linear_fc1.weight"].chunk(2)
        state |= {f"{target}self_attn.{name}_proj.weight": part for name, part in zip("qkv", parts, strict=True)}
        state |= {
            f"{target}self_attn.q_norm.weight": ours[f"{source}self_attention.q_layernorm.weight"],
            f"{target}self_attn.k_norm.weight": ours[f"{source}self_attention.k_layernorm.weight"],
            f"{target}self_attn.o_proj.weight": ours[f"{source}self_attention.linear_proj.weight"],
            f"{target}input_layernorm.weight": ours[f"{source}input_layernorm.weight"],
            f"{target}post_attention_layernorm.weight": ours[f"{source}pre_mlp_layernorm.weight"],
            f"{target}mlp.gate_proj.weight": gate,
            f"{target}mlp.up_proj.weight": up,
            f"{target}mlp.down_proj.weight": ours[f"{source}mlp.linear_fc2.weight"],
        }
    theirs.load_state_dict(state)
    return theirs


def compared(tensor: int) -> dict[str, float]:
    """Largest relative differences to Qwen3: of losses, and of the gradients of the norms and of one matrix."""
    import minicpm_megatron as library
    from minicpm_megatron.model.sharding import named_shards
    from minicpm_megatron.parallel import groups
    from minicpm_megatron.recipe import Layout, ParallelRecipe

    groups.initialize(
        Layout(tensor, tensor, 1, 1, 1, 1, (1,)), init_method=f"file://{os.environ['MINICPM_TEST_STORE']}"
    )
    shape = small_model(**SHAPE)
    ours = weights(shape)
    rows = torch.randint(shape.vocab_size, (2, 25), generator=torch.Generator().manual_seed(7))
    theirs = qwen3(shape, ours)
    logits = theirs(rows[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
    expected.mean().backward()
    config = library.MiniCPMConfig.from_recipe(shape, ParallelRecipe(tensor_model_parallel_size=tensor))
    found = {}
    for form in (library.MiniCPMModel, library.MiniCPMHybridModel):
        model = form(config)
        with torch.no_grad():
            for name, parameter, spec in named_shards(model, config):
                parameter.copy_(spec.take(ours[name], tuple(parameter.shape)))
        losses = model(put(rows[:, :-1]), labels=put(rows[:, 1:]))
        losses.mean().backward()
        found[f"{form.__name__}, losses"] = float(((losses.cpu() - expected).abs().max() / expected.max()).detach())
        for name, parameter, _ in named_shards(model, config):
            if name.endswith(("q_layernorm.weight", "k_layernorm.weight", "final_layernorm.weight")):
                their_name = name.replace("decoder.layers", "model.layers").replace("self_attention", "self_attn")
                their_name = their_name.replace("_layernorm", "_norm").replace("decoder.final_norm", "model.norm")
                gradient = theirs.get_parameter(their_name).grad
                difference = (parameter.grad.cpu() - gradient).abs().max() / gradient.abs().max()
                found[f"{form.__name__}, {name}"] = float(difference)
    return found


@pytest.mark.parametrize("tensor", [1, 2])
def test_losses_and_gradients_are_qwen3s(tensor: int) -> None:
    """Sequence parallelism is in `tests/distributed/test_parity.py`."""
    for rank in run_on_ranks("tests.model.test_qk_layernorm:compared", tensor, tensor=tensor):
        assert len(rank) == 2 * (1 + 2 * SHAPE["num_layers"] + 1)
        assert max(rank.values()) < 1e-5, rank


def test_the_norms_are_counted() -> None:
    model = presets["minicpm-2.4b"]
    normed = model.model_copy(update={"qk_layernorm": True})
    assert count_parameters(normed).total == count_parameters(model).total + 40 * 2 * 64
    shape = small_model(**SHAPE)
    assert count_parameters(shape).total == sum(each.numel() for each in weights(shape).values())


def test_formats_without_the_norm_are_refused(tmp_path: Path) -> None:
    shape = small_model(**SHAPE)
    write_single(tmp_path / "run", weights(shape).items(), shape.model_dump(mode="json"), {"step": 0, "tokens": 0})
    for target in ("llama", "granite", "minicpm", "torch_dist"):
        with pytest.raises(UserError, match=f"--to {target}: .*the norm of queries and keys"):
            convert(tmp_path / "run", tmp_path / "out", target)
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="no published format here has the norm of queries and keys"):
        as_granite(open_source(tmp_path / "run"), None)  # what generation and evaluation run
    convert(tmp_path / "run", tmp_path / "out", "megatron")
