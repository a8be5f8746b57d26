"""MiniCPM (arXiv 2404.06395) on NVIDIA Megatron-Core, driven by DeepSpeed.

The names below are the library's surface; each is usable alone, without the trainer. They are loaded on first use, so
that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_SURFACE = {
    "presets": "minicpm_megatron.recipe:PRESETS",
    "load_recipe": "minicpm_megatron.recipe:load_recipe",
    "MiniCPMConfig": "minicpm_megatron.model.config:MiniCPMConfig",
    "MiniCPMModel": "minicpm_megatron.model.model:MiniCPMModel",
    "MiniCPMHybridModel": "minicpm_megatron.model.hybrid:MiniCPMHybridModel",
    "get_minicpm_hybrid_stack_spec": "minicpm_megatron.model.hybrid:get_minicpm_hybrid_stack_spec",
    "get_minicpm_layer_spec": "minicpm_megatron.model.layer_spec:get_minicpm_layer_spec",
    "get_minicpm_block_spec": "minicpm_megatron.model.layer_spec:get_minicpm_block_spec",
    "VocabParallelLinearCrossEntropy": "minicpm_megatron.model.fused_loss:VocabParallelLinearCrossEntropy",
    "initialize_parameters": "minicpm_megatron.model.initialize:initialize_parameters",
    "mup_param_groups": "minicpm_megatron.methods.mup:mup_param_groups",
    "upcycle_state_dict": "minicpm_megatron.methods.upcycling:upcycle_state_dict",
    "ScalingLaw": "minicpm_megatron.methods.scaling_law:ScalingLaw",
    "fit_scaling_law": "minicpm_megatron.methods.scaling_law:fit_scaling_law",
    "WSDScheduler": "minicpm_megatron.methods.torch_schedulers:WSDScheduler",
    "CosineScheduler": "minicpm_megatron.methods.torch_schedulers:CosineScheduler",
    "CosineLoopScheduler": "minicpm_megatron.methods.torch_schedulers:CosineLoopScheduler",
    "ConstantScheduler": "minicpm_megatron.methods.torch_schedulers:ConstantScheduler",
}

__all__ = ["__version__", *_SURFACE]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _SURFACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _SURFACE[name].split(":")
    return getattr(import_module(module), attribute)
