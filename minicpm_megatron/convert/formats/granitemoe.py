"""IBM GraniteMoe: transformers' mixture of experts with exactly MiniCPM's multipliers, so weights go in unchanged.

Fields as in `granite`. The experts of a layer are stacked: input_linear [experts, 2 x intermediate_size, hidden_size]
with the gate's rows first, output_linear [experts, hidden_size, intermediate_size].
"""

from __future__ import annotations

from minicpm_megatron.convert import mapping
from minicpm_megatron.convert.format import Format
from minicpm_megatron.convert.formats import granite
from minicpm_megatron.convert.fused import STACK
from minicpm_megatron.convert.llama_names import LAYER, rows_around
from minicpm_megatron.convert.mapping import Row

_MODULE = LAYER + "block_sparse_moe."
FORMAT = Format(
    name="granitemoe",
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    rows=(),
    sparse_rows=rows_around(
        (
            Row(mapping.ROUTER, (_MODULE + "router.layer.weight",)),
            Row(mapping.EXPERT_INPUT, (_MODULE + "input_linear.weight",), STACK),
            Row(mapping.EXPERT_OUTPUT, (_MODULE + "output_linear.weight",), STACK),
        )
    ),
    experts_key="num_local_experts",
    write=granite.write,
    read=granite.read,
    check=lambda model: None,
)
