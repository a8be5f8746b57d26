"""The one place where Megatron-LM's trainer is changed: its optimizer groups, its scheduler, and its call of make.

`pretrain()` of megatron-core 0.19.2 makes both by itself: `setup_model_and_optimizer` calls
`get_megatron_optimizer_config`, whose overrides it passes on, and `get_optimizer_param_scheduler`, which constructs an
`OptimizerParamScheduler`. Neither takes an argument from outside. Once `pretrain()` has a parameter for overrides and
for a scheduler, this file goes.

`initialize_megatron` of the same version runs `make` in megatron/core/datasets and leaves the process when that fails.
The wheel ships the compiled helpers and no Makefile, so that no training starts from it. A checkout of the repository
has the Makefile, and there nothing is changed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
from pathlib import Path
from typing import Any

from megatron.core.datasets import utils as datasets_utils
from megatron.training import training
from megatron.training.global_vars import get_args
from megatron.training.models.base import ModelConfig

from minicpm_megatron.megatron_lm.arguments import check_arguments
from minicpm_megatron.megatron_lm.models import initial_weights
from minicpm_megatron.megatron_lm.optimizer import mup_config_overrides
from minicpm_megatron.megatron_lm.scheduler import MiniCPMParamScheduler

HELPERS_ARE_COMPILED = importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None


def use_minicpm_training(model_config: ModelConfig | None = None) -> None:
    """Let `pretrain()` start from MiniCPM's initial weights, and train with muP's groups and MiniCPM's WSD.

    Args:
        model_config: what `pretrain()` will build, of `minicpm_model_config_from_args`, or of Megatron-LM's
            `gpt_config_from_args` or `hybrid_config_from_args` with a --spec of MiniCPM. None where it is given a
            model provider, which then calls `initial_weights` itself.

    Raises:
        UserError: arguments that do not go with them; see `check_arguments`.
    """
    args = get_args()
    check_arguments(args)
    args.minicpm_training = True
    if model_config is not None and initial_weights not in model_config.pre_wrap_hooks:
        model_config.pre_wrap_hooks.append(initial_weights)
    if training.OptimizerParamScheduler is not MiniCPMParamScheduler:
        _patch_trainer()


def _patch_trainer() -> None:
    training.OptimizerParamScheduler = MiniCPMParamScheduler
    original = training.get_megatron_optimizer_config

    @functools.wraps(original)
    def with_mup(args: argparse.Namespace) -> tuple[Any, Any]:
        config, _ = original(args)
        return config, mup_config_overrides(config, args)

    training.get_megatron_optimizer_config = with_mup
    if HELPERS_ARE_COMPILED and not (Path(datasets_utils.__file__).parent / "Makefile").exists():
        datasets_utils.compile_helpers = lambda: None
