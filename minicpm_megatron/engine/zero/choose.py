"""The choice of an adapter, from the recipe and the resolved DeepSpeed JSON."""

from __future__ import annotations

from typing import Any

from minicpm_megatron.engine.zero.adapter import Adapter
from minicpm_megatron.engine.zero.stage0 import Whole, WholeBf16
from minicpm_megatron.engine.zero.stage1_bf16 import Stage1Bf16
from minicpm_megatron.engine.zero.stage3 import OffloadedStage3, Stage3
from minicpm_megatron.engine.zero.stages_1_and_2 import FlatStage1, OffloadedStages1And2, Stages1And2
from minicpm_megatron.parallel import device
from minicpm_megatron.recipe import Layout, Recipe


def choose_adapter(recipe: Recipe, layout: Layout, config: dict[str, Any]) -> Adapter:
    """Return the adapter for the optimizer that DeepSpeed will build.

    | ZeRO | fp32 | bf16 | offloaded |
    | --- | --- | --- | --- |
    | 0 | Whole | WholeBf16 | - |
    | 1 | FlatStage1 (CPU), Stages1And2 | Stage1Bf16 | OffloadedStages1And2 |
    | 2 | Stages1And2 | Stages1And2 | OffloadedStages1And2 |
    | 3 | Stage3 | Stage3 | OffloadedStage3 |

    Args:
        config: what `config.deepspeed_config` returns.
    """
    return _class_for(recipe, layout, config)(recipe, layout, config)


def _class_for(recipe: Recipe, layout: Layout, config: dict[str, Any]) -> type[Adapter]:
    stage, bf16 = recipe.deepspeed.zero_stage, recipe.training.precision == "bf16"
    offloaded = recipe.deepspeed.offload_optimizer != "none"
    if stage == 0:
        return WholeBf16 if bf16 else Whole
    if stage == 3:
        return OffloadedStage3 if offloaded else Stage3
    if offloaded:
        return OffloadedStages1And2
    if stage == 1 and bf16:
        return Stage1Bf16
    return FlatStage1 if stage == 1 and _may_keep_gradients_flat(layout, config) else Stages1And2


def _may_keep_gradients_flat(layout: Layout, config: dict[str, Any]) -> bool:
    """Whether `FlatGradientOptimizer` knows all that is asked of ZeRO 1 in fp32, and is faster.

    On CUDA the allocator keeps memory, and what it keeps is better used by forward.
    """
    # DeepSpeed ignores the setting in a pipeline
    overlaps = config["zero_optimization"]["overlap_comm"] and layout.pipeline_model_parallel_size == 1
    other_sums = config.get("data_types", {}).get("grad_accum_dtype") not in (None, "fp32")
    return device.on_cpu() and not overlaps and not other_sums and layout.expert_model_parallel_size == 1
