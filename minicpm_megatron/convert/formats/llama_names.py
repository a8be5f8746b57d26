"""The tensor names of Llama, which MiniCPM and Granite took over unchanged."""

from __future__ import annotations

from minicpm_megatron.convert import mapping
from minicpm_megatron.convert.fused import GATE_UP, QKV
from minicpm_megatron.convert.mapping import Row

_LAYER = "model.layers.*."
DENSE_ROWS = (
    Row(mapping.EMBEDDING, ("model.embed_tokens.weight",)),
    Row(mapping.INPUT_NORM, (_LAYER + "input_layernorm.weight",)),
    Row(mapping.QKV_WEIGHT, tuple(f"{_LAYER}self_attn.{part}_proj.weight" for part in "qkv"), QKV),
    Row(mapping.ATTENTION_OUTPUT, (_LAYER + "self_attn.o_proj.weight",)),
    Row(mapping.MLP_NORM, (_LAYER + "post_attention_layernorm.weight",)),
    Row(mapping.MLP_INPUT, (_LAYER + "mlp.gate_proj.weight", _LAYER + "mlp.up_proj.weight"), GATE_UP),
    Row(mapping.MLP_OUTPUT, (_LAYER + "mlp.down_proj.weight",)),
    Row(mapping.FINAL_NORM, ("model.norm.weight",)),
    Row(mapping.HEAD, ("lm_head.weight",)),
)
