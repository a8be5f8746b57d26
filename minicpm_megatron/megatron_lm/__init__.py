"""MiniCPM inside Megatron-LM's own trainer: arguments, models, optimizer groups, schedule, and a `pretrain` of our own.

Loading this package loads `megatron.training`, which takes seconds; nothing else of ours does.
"""

from minicpm_megatron.megatron_lm.arguments import add_minicpm_args, check_arguments
from minicpm_megatron.megatron_lm.models import (
    initial_weights,
    minicpm_config_from_args,
    minicpm_model_config_from_args,
)
from minicpm_megatron.megatron_lm.optimizer import mup_config_overrides
from minicpm_megatron.megatron_lm.scheduler import MiniCPMParamScheduler
from minicpm_megatron.megatron_lm.trainer import use_minicpm_training

__all__ = [
    "MiniCPMParamScheduler",
    "add_minicpm_args",
    "check_arguments",
    "initial_weights",
    "minicpm_config_from_args",
    "minicpm_model_config_from_args",
    "mup_config_overrides",
    "use_minicpm_training",
]
