"""A MiniCPM forward pass in plain torch, from the paper's Table 7 and the published tensor names; nothing of ours.

Two ways to the same weights: `published` reads the published names, `canonical` takes Megatron-Core's fused tensors
apart head by head. Both are written out with loops on purpose, to share no code and no trick with the package.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

Weights = Mapping[str, torch.Tensor]


def published(weights: Weights, config: Mapping[str, Any]) -> dict[str, Any]:
    """Published MiniCPM tensors by their role."""
    layers = []
    for n in range(config["num_hidden_layers"]):
        p = f"model.layers.{n}."
        modules = [("gate_proj", "up_proj", "down_proj")]
        if config.get("num_experts"):
            modules = [tuple(f"experts.{e}.{w}" for w in ("w1", "w3", "w2")) for e in range(config["num_experts"])]
        experts = [
            {
                name: weights[f"{p}mlp.{module}.weight"]
                for name, module in zip(("gate", "up", "down"), names, strict=True)
            }
            for names in modules
        ]
        layers.append(
            {
                "norm1": weights[p + "input_layernorm.weight"],
                "q": weights[p + "self_attn.q_proj.weight"],
                "k": weights[p + "self_attn.k_proj.weight"],
                "v": weights[p + "self_attn.v_proj.weight"],
                "o": weights[p + "self_attn.o_proj.weight"],
                "norm2": weights[p + "post_attention_layernorm.weight"],
                "router": weights.get(p + "mlp.gate.weight"),
                "experts": experts,
            }
        )
    embedding = weights["model.embed_tokens.weight"]
    return {
        "embedding": embedding,
        "layers": layers,
        "norm": weights["model.norm.weight"],
        "head": weights.get("lm_head.weight", embedding),
    }


def canonical(weights: Weights, config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron-Core's fused tensors by their role."""
    heads, groups, channels = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    layers = []
    for n in range(config["num_hidden_layers"]):
        p = f"decoder.layers.{n}."
        rows = list(weights[p + "self_attention.linear_qkv.weight"].split(channels))
        parts: dict[str, list[torch.Tensor]] = {"q": [], "k": [], "v": []}
        for _ in range(groups):
            for _ in range(heads // groups):
                parts["q"].append(rows.pop(0))
            parts["k"].append(rows.pop(0))
            parts["v"].append(rows.pop(0))
        assert not rows
        experts = []
        for e in range(config.get("num_experts") or 1):
            module = f"mlp.experts.local_experts.{e}." if config.get("num_experts") else "mlp."
            fc1 = weights[p + module + "linear_fc1.weight"]
            half = fc1.shape[0] // 2
            experts.append({"gate": fc1[:half], "up": fc1[half:], "down": weights[p + module + "linear_fc2.weight"]})
        layers.append(
            {
                "norm1": weights[p + "input_layernorm.weight"],
                **{name: torch.cat(part) for name, part in parts.items()},
                "o": weights[p + "self_attention.linear_proj.weight"],
                "norm2": weights[p + "pre_mlp_layernorm.weight"],
                "router": weights.get(p + "mlp.router.weight"),
                "experts": experts,
            }
        )
    embedding = weights["embedding.word_embeddings.weight"]
    return {
        "embedding": embedding,
        "layers": layers,
        "norm": weights["decoder.final_layernorm.weight"],
        "head": weights.get("output_layer.weight", embedding),
    }


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def _rotate(x: torch.Tensor, base: float) -> torch.Tensor:
    """Half-rotation RoPE over [sequence, channels]."""
    length, channels = x.shape
    half = channels // 2
    angles = torch.arange(length)[:, None] * base ** (-torch.arange(half) * 2.0 / channels)[None, :]
    first, second = x[:, :half], x[:, half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def _mlp(x: torch.Tensor, weights: Weights) -> torch.Tensor:
    gate = x @ weights["gate"].T
    return (gate * gate.sigmoid() * (x @ weights["up"].T)) @ weights["down"].T


def _mixture(token: torch.Tensor, layer: Mapping[str, Any], chosen: int) -> torch.Tensor:
    """[hidden]: softmax over all experts, the `chosen` largest, renormalised to sum to 1."""
    probabilities = (layer["router"] @ token).softmax(0).tolist()
    best = sorted(range(len(probabilities)), key=lambda e: -probabilities[e])[:chosen]
    total = sum(probabilities[e] for e in best)
    output = torch.zeros_like(token)
    for e in best:
        output = output + probabilities[e] / total * _mlp(token, layer["experts"][e])
    return output


def logits(model: Mapping[str, Any], config: Mapping[str, Any], tokens: torch.Tensor) -> torch.Tensor:
    """[sequence] ids -> [sequence, vocabulary] logits."""
    heads, groups, channels = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    residual = config["scale_depth"] / math.sqrt(config["num_hidden_layers"])
    hidden, base, eps = config["hidden_size"], config["rope_theta"], config["rms_norm_eps"]
    future = torch.ones(len(tokens), len(tokens)).triu(1).bool()
    x = model["embedding"][tokens] * config["scale_emb"]
    for layer in model["layers"]:
        y = _norm(x, layer["norm1"], eps)
        outputs = []
        for head in range(heads):
            shared = head // (heads // groups)
            q = _rotate(y @ layer["q"][head * channels : (head + 1) * channels].T, base)
            k = _rotate(y @ layer["k"][shared * channels : (shared + 1) * channels].T, base)
            v = y @ layer["v"][shared * channels : (shared + 1) * channels].T
            scores = (q @ k.T / math.sqrt(channels)).masked_fill(future, -math.inf)
            outputs.append(scores.softmax(-1) @ v)
        x = x + residual * (torch.cat(outputs, -1) @ layer["o"].T)
        y = _norm(x, layer["norm2"], eps)
        if layer["router"] is None:
            x = x + residual * _mlp(y, layer["experts"][0])
        else:
            rows = [_mixture(row, layer, config["num_experts_per_tok"]) for row in y]
            x = x + residual * torch.stack(rows)
    return _norm(x, model["norm"], eps) / (hidden / config["dim_model_base"]) @ model["head"].T
