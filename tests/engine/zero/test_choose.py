"""The adapter is chosen from the recipe, and refuses any other optimizer that DeepSpeed has built."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minicpm_megatron.engine.config import deepspeed_config
from minicpm_megatron.engine.zero.adapter import Adapter
from minicpm_megatron.engine.zero.choose import choose_adapter
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import build


def chosen(
    stage: int, precision: str, offload: str = "none", stages: int = 1, overlay: dict[str, Any] | None = None
) -> Adapter:
    recipe = build(
        {
            "name": "x",
            "preset": "minicpm-nano",
            "data": {"train": [{"prefix": "x"}], "sequence_length": 32},
            "training": {"global_batch_size": 16, "micro_batch_size": 2, "precision": precision},
            "schedule": {"shape": "constant", "total": 10},
            "parallel": {"pipeline_model_parallel_size": stages},
            "deepspeed": {"zero_stage": stage, "offload_optimizer": offload},
        }
    )
    layout = recipe.check_world_size(2)
    config = deepspeed_config(recipe, layout)
    config["zero_optimization"] |= overlay or {}
    return choose_adapter(recipe, layout, config)


def names(adapter: Adapter) -> tuple[str, str]:
    return type(adapter).__name__, getattr(adapter.optimizer_class, "__name__", "none of DeepSpeed's")


@pytest.mark.parametrize(
    ("arguments", "adapter", "optimizer"),
    [
        ((0, "fp32"), "Whole", "none of DeepSpeed's"),
        ((0, "bf16"), "WholeBf16", "UnfusedOptimizer"),
        ((1, "bf16"), "Stage1Bf16", "BF16_Optimizer"),
        ((2, "fp32"), "Stages1And2", "DeepSpeedZeroOptimizer"),
        ((2, "bf16"), "Stages1And2", "DeepSpeedZeroOptimizer"),
        ((1, "fp32", "cpu"), "OffloadedStages1And2", "DeepSpeedZeroOptimizer"),
        ((1, "bf16", "cpu"), "OffloadedStages1And2", "DeepSpeedZeroOptimizer"),
        ((2, "bf16", "cpu"), "OffloadedStages1And2", "DeepSpeedZeroOptimizer"),
        ((3, "fp32"), "Stage3", "DeepSpeedZeroOptimizer_Stage3"),
        ((3, "bf16"), "Stage3", "DeepSpeedZeroOptimizer_Stage3"),
        ((3, "bf16", "cpu"), "OffloadedStage3", "DeepSpeedZeroOptimizer_Stage3"),
        ((0, "fp32", "none", 2), "Whole", "none of DeepSpeed's"),
        ((1, "bf16", "none", 2), "Stage1Bf16", "BF16_Optimizer"),
        ((1, "bf16", "cpu", 2), "OffloadedStages1And2", "OneNormOptimizer"),
    ],
)
def test_every_stage_and_precision_has_an_adapter(arguments: Any, adapter: str, optimizer: str) -> None:
    assert names(chosen(*arguments)) == (adapter, optimizer)


@pytest.mark.cpu_only("gradients stay in flat buffers on the CPU alone")
def test_gradients_stay_flat_unless_a_setting_asks_for_what_the_buffers_do_not_know() -> None:
    assert names(chosen(1, "fp32")) == ("FlatStage1", "FlatGradientOptimizer")
    assert names(chosen(1, "fp32", stages=2)) == ("FlatStage1", "OneNormFlatOptimizer")
    overlapping = {"overlap_comm": True}
    assert names(chosen(1, "fp32", overlay=overlapping)) == ("Stages1And2", "DeepSpeedZeroOptimizer")
    # in a pipeline DeepSpeed overlaps nothing
    assert names(chosen(1, "fp32", stages=2, overlay=overlapping)) == ("FlatStage1", "OneNormFlatOptimizer")


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (3, "fp32")])
def test_another_optimizer_is_refused_in_one_line_with_the_versions(stage: int, precision: str) -> None:
    inner = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    engine = SimpleNamespace(optimizer=SimpleNamespace())
    with pytest.raises(UserError, match=r"DeepSpeed \d+\.\d+\.\d+ made SimpleNamespace for ZeRO") as refusal:
        chosen(stage, precision).attach(engine, inner, lambda: None)
    line = str(refusal.value)
    assert f"ZeRO {stage} in {precision}" in line and "install deepspeed 0.19.8" in line and "\n" not in line
