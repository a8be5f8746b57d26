"""Keys of a config.json that change what a model computes, and that nothing here implements.

A key that is unknown to the program that reads it is ignored, and the model is another one without a word. So whatever
a published configuration can say about the computation is either read or, with any value but a neutral one, refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minicpm_megatron.errors import UserError, shorten

# key -> what it changes; null and false leave the result as it is
_OFF_ONLY = {
    "sparse_config": "sparse attention, MiniCPM4's InfLLM v2",
    "use_qk_norm": "a norm of queries and keys",
    "qk_norm": "a norm of queries and keys",
    "qk_layernorm": "a norm of queries and keys",
    "clip_qkv": "clipped queries, keys and values",
    "attn_logit_softcapping": "capped attention scores",
    "final_logit_softcapping": "capped logits",
    "logits_soft_cap": "capped logits",
    "query_pre_attn_scalar": "another scale of attention",
    "attn_temperature_tuning": "a scale of attention that grows with the position",
    "parallel_attn": "attention beside the MLP",
    "use_parallel_residual": "attention beside the MLP",
    "alibi": "positions without RoPE",
    "no_rope_layers": "layers without RoPE",
    "no_rope_layer_interval": "layers without RoPE",
    "rope_interleaved": "RoPE over neighbouring channels",
    "num_shared_experts": "experts that serve every token",
    "n_shared_experts": "experts that serve every token",
    "shared_intermediate_size": "experts that serve every token",
    "first_k_dense_replace": "dense layers among the sparse ones",
    "mlp_only_layers": "dense layers among the sparse ones",
    "compression_config": "quantised weights",
}
# key -> (the only value that leaves the result as it is, what another one changes)
_NEUTRAL: dict[str, tuple[Any, str]] = {
    "partial_rotary_factor": (1.0, "RoPE on a part of the channels"),
    "logit_scale": (1.0, "scaled logits"),
    "rotary_pct": (1.0, "RoPE on a part of the channels"),
    "norm_topk_prob": (True, "weights of a token's experts that do not sum to 1"),
    "routed_scaling_factor": (1.0, "scaled experts"),
    "scoring_func": ("softmax", "another router"),
    "moe_layer_freq": (1, "dense layers among the sparse ones"),
    "decoder_sparse_step": (1, "dense layers among the sparse ones"),
    "n_group": (1, "experts chosen group by group"),
}
_FULL_ATTENTION = "full_attention"


def refuse_unimplemented(config: Mapping[str, Any]) -> None:
    """Refuse a configuration that asks for a computation which is not implemented.

    Raises:
        UserError: naming the first such key.
    """
    for key, what in _OFF_ONLY.items():
        if config.get(key) not in (None, False, [], 0):
            raise _refusal(key, config[key], what, "null")
    for key, (neutral, what) in _NEUTRAL.items():
        if config.get(key) is not None and config[key] != neutral:
            raise _refusal(key, config[key], what, repr(neutral))
    # with a switch of its own that is off, the length of the window is left over
    if config.get("sliding_window") is not None and config.get("use_sliding_window") is not False:
        raise _refusal("sliding_window", config["sliding_window"], "attention to the latest tokens alone", "null")
    kinds = config.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != _FULL_ATTENTION for kind in kinds)):
        raise _refusal("layer_types", kinds, "layers of another kind", f"{_FULL_ATTENTION!r} for every layer")
    # the depth that MiniCPM scales its residuals by, where it is not that of the model
    if config.get("mup_denominator") not in (None, config.get("num_hidden_layers")):
        raise _refusal("mup_denominator", config["mup_denominator"], "the residuals' scale", "num_hidden_layers")


def _refusal(key: str, value: Any, what: str, neutral: str) -> UserError:
    return UserError(f"{key} {shorten(value)} is not supported ({what})", fix=f"only {neutral} can be imported")
