"""The tensor names of Llama, which MiniCPM and Granite took over unchanged, and those of mixtures of experts."""

from __future__ import annotations

from minicpm_megatron.convert import mapping
from minicpm_megatron.convert.fused import GATE_UP, QKV
from minicpm_megatron.convert.mapping import Row

LAYER = "model.layers.*."


def rows_around(feed_forward: tuple[Row, ...]) -> tuple[Row, ...]:
    """The whole table of a model whose layers end with these rows."""
    return (
        Row(mapping.EMBEDDING, ("model.embed_tokens.weight",)),
        Row(mapping.INPUT_NORM, (LAYER + "input_layernorm.weight",)),
        Row(mapping.QKV_WEIGHT, tuple(f"{LAYER}self_attn.{part}_proj.weight" for part in "qkv"), QKV),
        Row(mapping.ATTENTION_OUTPUT, (LAYER + "self_attn.o_proj.weight",)),
        Row(mapping.MLP_NORM, (LAYER + "post_attention_layernorm.weight",)),
        *feed_forward,
        Row(mapping.FINAL_NORM, ("model.norm.weight",)),
        Row(mapping.HEAD, ("lm_head.weight",)),
    )


DENSE_ROWS = rows_around(
    (
        Row(mapping.MLP_INPUT, (LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight"), GATE_UP),
        Row(mapping.MLP_OUTPUT, (LAYER + "mlp.down_proj.weight",)),
    )
)


def expert_rows(module: str) -> tuple[Row, ...]:
    """A mixture whose experts are tensors of their own, as MiniCPM and Mixtral name them below `module`."""
    expert = f"{LAYER}{module}.experts.*."
    return rows_around(
        (
            Row(mapping.ROUTER, (f"{LAYER}{module}.gate.weight",)),
            Row(mapping.EXPERT_INPUT, (expert + "w1.weight", expert + "w3.weight"), GATE_UP),
            Row(mapping.EXPERT_OUTPUT, (expert + "w2.weight",)),
        )
    )
