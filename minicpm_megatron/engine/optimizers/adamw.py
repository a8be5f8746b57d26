"""AdamW (Loshchilov and Hutter, arXiv 1711.05101): torch's, or DeepSpeed's on the host of a CUDA device."""

from __future__ import annotations

from typing import Any

from minicpm_megatron.recipe import OptimizerRecipe
from minicpm_megatron.recipe.optimizer import Optimizer


def build(groups: list[dict[str, Any]], recipe: OptimizerRecipe, on_host: bool) -> Any:
    """As `Optimizer.build`."""
    settings: dict[str, Any] = {"lr": recipe.lr, "betas": recipe.betas, "eps": recipe.eps}
    if on_host:
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiles itself when it is first made

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    import torch

    return torch.optim.AdamW(groups, fused=True, **settings)


OPTIMIZER = Optimizer(build=build, moments=("exp_avg", "exp_avg_sq"))
