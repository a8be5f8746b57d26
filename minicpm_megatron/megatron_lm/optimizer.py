"""muP's groups for Megatron-Core's optimizers, through their own mechanism of overrides by parameter."""

from __future__ import annotations

import functools

import torch
from megatron.core.optimizer.optimizer_config import OptimizerConfig, ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from minicpm_megatron.methods.mup import ROLES, Shape, mup_table, role_of


def parameter_role(parameter: torch.nn.Parameter, name: str) -> str:
    """Role of a parameter in the muP table.

    The last pipeline stage's copy of a tied embedding is called output_layer.weight. It is the embedding there, too, or
    weight decay would pull the two copies apart.
    """
    return "embedding" if getattr(parameter, "shared_embedding", False) else role_of(name, parameter.dim())


def mup_config_overrides(config: OptimizerConfig, shape: Shape) -> dict[ParamKey, ParamGroupOverride]:
    """`config_overrides` of Megatron-Core's `get_megatron_optimizer`: one group for each role, as `mup_param_groups`.

    They replace Megatron-Core's standard overrides. Every group has the role as `name`, the multiplier as Megatron's
    `lr_mult`, and `wd_mult` 0 where the table knows no weight decay. Megatron-LM logs the learning rate of a group
    whose override leaves learning rates alone, so those with multiplier 1 do.

    Args:
        config: gives the base learning rate (`lr`) and its floor (`min_lr`).
        shape: width and reading of the table; Megatron-LM's arguments serve as well.
    """
    assert config.lr is not None
    overrides = {}
    for role, rule in mup_table(shape).items():
        override: dict[str, object] = {"name": role, "wd_mult": 1.0 if rule.decays else 0.0}
        if rule.lr_multiplier != 1.0:
            override |= {
                "lr_mult": rule.lr_multiplier,
                "max_lr": config.lr * rule.lr_multiplier,
                "min_lr": (config.min_lr or 0.0) * rule.lr_multiplier,
            }
        has_role = ParamWithNamePredicate(name=f"minicpm_{role}", fn=functools.partial(_has_role, role))
        overrides[ParamKey(with_name_predicate=has_role)] = override
    assert set(mup_table(shape)) == set(ROLES)
    return overrides  # type: ignore[return-value]


def _has_role(role: str, parameter: torch.nn.Parameter, name: str) -> bool:
    return parameter_role(parameter, name) == role
