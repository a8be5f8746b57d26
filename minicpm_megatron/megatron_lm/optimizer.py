"""muP's groups for Megatron-Core's optimizers, through their own mechanism of overrides by parameter."""

from __future__ import annotations

import functools
from collections.abc import Set
from typing import Any

import torch
from megatron.core.optimizer.optimizer_config import OptimizerConfig, ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from minicpm_megatron.methods.mup import Shape, mup_table, role_of


def parameter_role(parameter: torch.nn.Parameter, name: str) -> str:
    """Role of a parameter in the muP table.

    The last pipeline stage's copy of a tied embedding is called output_layer.weight. It is the embedding there, too, or
    weight decay would pull the two copies apart.
    """
    return "embedding" if getattr(parameter, "shared_embedding", False) else role_of(name, parameter.dim())


def group_multipliers(shape: Shape) -> dict[str, float]:
    """Learning-rate multiplier of every group, by its name: the roles in it, "embedding, vector".

    Roles with the same multiplier and the same weight decay share a group. Megatron-Core 0.19 finds the groups of a
    checkpoint again by these numbers, and takes two groups that have the same ones for one.
    """
    return {", ".join(roles): multiplier for (multiplier, _), roles in _roles_by_rule(shape).items()}


def _roles_by_rule(shape: Shape) -> dict[tuple[float, bool], list[str]]:
    found: dict[tuple[float, bool], list[str]] = {}
    for role, rule in mup_table(shape).items():
        found.setdefault((rule.lr_multiplier, rule.decays), []).append(role)
    return found


def mup_config_overrides(config: OptimizerConfig, shape: Shape) -> dict[ParamKey, ParamGroupOverride]:
    """The `config_overrides` of Megatron-Core's `get_megatron_optimizer`: rates and decay as in `mup_param_groups`.

    They replace Megatron-Core's standard overrides. Every group has its roles as `name`, the multiplier as Megatron's
    `lr_mult`, and `wd_mult` 0 where the table knows no weight decay. Megatron-LM logs the learning rate of a group
    whose override leaves learning rates alone, so those with multiplier 1 do.

    Args:
        config: gives the base learning rate (`lr`) and its floor (`min_lr`).
        shape: width and reading of the table; Megatron-LM's arguments serve as well.
    """
    assert config.lr is not None
    overrides: dict[ParamKey, Any] = {}
    for (multiplier, decays), roles in _roles_by_rule(shape).items():
        name = ", ".join(roles)
        override: dict[str, Any] = {"name": name, "wd_mult": 1.0 if decays else 0.0}
        if multiplier != 1.0:
            override |= {
                "lr_mult": multiplier,
                "max_lr": config.lr * multiplier,
                "min_lr": (config.min_lr or 0.0) * multiplier,
            }
        has_role = ParamWithNamePredicate(name=f"minicpm: {name}", fn=functools.partial(_has_role, frozenset(roles)))
        overrides[ParamKey(with_name_predicate=has_role)] = override
    return overrides


def _has_role(roles: Set[str], parameter: torch.nn.Parameter, name: str) -> bool:
    return parameter_role(parameter, name) in roles
