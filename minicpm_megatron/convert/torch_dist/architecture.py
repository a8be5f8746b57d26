"""Megatron-LM's arguments compared with a model, made into one, and made from one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import ModelRecipe, build_section

# field of ModelRecipe -> Megatron-LM's argument, with the name it had in earlier releases
_ARGUMENTS = {
    "num_layers": ("num_layers",),
    "hidden_size": ("hidden_size",),
    "ffn_hidden_size": ("ffn_hidden_size",),
    "num_attention_heads": ("num_attention_heads",),
    "kv_channels": ("kv_channels",),
    "rotary_base": ("rotary_base",),
    "norm_epsilon": ("layernorm_epsilon", "norm_epsilon"),
    "untie_embeddings_and_output_weights": ("untie_embeddings_and_output_weights",),
    "num_moe_experts": ("num_experts",),
    "scale_emb": ("scale_emb",),
    "scale_depth": ("scale_depth",),
    "dim_model_base": ("dim_model_base",),
    "parametrization": ("parametrization",),
    "vocab_size": ("vocab_size",),
}
_EXPERT_ARGUMENTS = {
    "moe_router_topk": ("moe_router_topk",),
    "moe_router_pre_softmax": ("moe_router_pre_softmax",),
    "moe_ffn_hidden_size": ("moe_ffn_hidden_size",),
}
# without influence on tensors and logits: read only where arguments alone describe the model
_OTHER_ARGUMENTS = {
    "max_position_embeddings": ("max_position_embeddings",),
    "init_method_std": ("init_method_std",),
    "embedding_role": ("embedding_role",),
}
_OTHER_EXPERT_ARGUMENTS = {
    "moe_router_load_balancing_type": ("moe_router_load_balancing_type",),
    "moe_aux_loss_coeff": ("moe_aux_loss_coeff",),
    "moe_z_loss_coeff": ("moe_z_loss_coeff",),
}
_ROPE_TYPE, _ROPE_FACTOR = "minicpm_rope_scaling_type", "minicpm_rope_scaling_factor"  # of megatron_lm.arguments
_MULTIPLIERS = ("scale_emb", "scale_depth", "dim_model_base")
# arguments that are the same for every MiniCPM; the shapes of tensors do not show them
_ALWAYS: dict[str, Any] = {
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "swiglu": True,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": False,
}
_FIX = "give the --preset or --recipe of the model that was trained"


def model_of_args(args: Mapping[str, Any], where: str) -> ModelRecipe | None:
    """The model that arguments with MiniCPM's multipliers describe; None where they lack one, or the vocabulary.

    Raises:
        UserError: they describe none.
    """
    fields = _described(args, _all_arguments(sparse=bool(args.get("num_experts"))))
    if any(fields.get(name) is None for name in (*_MULTIPLIERS, "vocab_size")):
        return None
    return build_section(ModelRecipe, {name: value for name, value in fields.items() if value is not None}, where=where)


def check_args(args: Mapping[str, Any], model: ModelRecipe, where: str) -> None:
    """Compare the arguments that there are with the model.

    Raises:
        UserError: naming the first argument that is another.
    """
    for argument, wanted in _ALWAYS.items():
        if args.get(argument, wanted) != wanted:
            raise UserError(f"{argument} is {args[argument]!r}, and {wanted!r} in every MiniCPM", where=where)
    table = _table(sparse=model.num_moe_experts is not None)
    said = _described(args, table)
    for field, value in said.items():
        wanted = model.mlp_width if field == "moe_ffn_hidden_size" else getattr(model, field)
        if field == "rope_scaling":
            wanted = {"type": model.rope_scaling.type, "factor": model.rope_scaling.factor}
        if value is None and field != "num_moe_experts":  # left to a default or, the vocabulary, to a tokenizer
            continue
        if not _equal(value, wanted):
            argument = next((name for name in table.get(field, ()) if name in args), field)
            raise UserError(
                f"{argument} is {value!r} in the arguments of the checkpoint, the model says {wanted!r}",
                where=where,
                fix=_FIX,
            )


def args_of_model(model: ModelRecipe) -> dict[str, Any]:
    """Megatron-LM's arguments for a model, with those of MiniCPM's multipliers."""
    sparse = model.num_moe_experts is not None
    return {
        **{names[0]: getattr(model, field) for field, names in _all_arguments(sparse=sparse).items()},
        **_ALWAYS,
        "moe_ffn_hidden_size": model.mlp_width if sparse else None,
        "group_query_attention": model.num_query_groups != model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        _ROPE_TYPE: model.rope_scaling.type,
        _ROPE_FACTOR: model.rope_scaling.factor,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }


def _table(*, sparse: bool) -> dict[str, tuple[str, ...]]:
    return _ARGUMENTS | (_EXPERT_ARGUMENTS if sparse else {})


def _all_arguments(*, sparse: bool) -> dict[str, tuple[str, ...]]:
    return _table(sparse=sparse) | _OTHER_ARGUMENTS | (_OTHER_EXPERT_ARGUMENTS if sparse else {})


def _described(args: Mapping[str, Any], table: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Fields of ModelRecipe that arguments name."""
    fields = {
        field: args[name]
        for field, names in table.items()
        if (name := next((name for name in names if name in args), None)) is not None
    }
    if "num_attention_heads" in fields and "group_query_attention" in args:
        grouped = args["group_query_attention"] and args.get("num_query_groups")
        fields["num_query_groups"] = args["num_query_groups"] if grouped else fields["num_attention_heads"]
    # Megatron-LM then takes ffn_hidden_size
    if "moe_ffn_hidden_size" in fields and fields["moe_ffn_hidden_size"] is None:
        fields["moe_ffn_hidden_size"] = fields.get("ffn_hidden_size")
    if args.get("hybrid_layer_pattern") and type(fields.get("num_layers")) is int:  # attention and MLP count as two
        fields["num_layers"] //= 2
    if args.get(_ROPE_TYPE) is not None:
        fields["rope_scaling"] = {"type": args[_ROPE_TYPE], "factor": args.get(_ROPE_FACTOR)}
    return fields


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, float) and isinstance(second, int | float):
        return math.isclose(first, second, rel_tol=1e-9)
    return bool(first == second)
