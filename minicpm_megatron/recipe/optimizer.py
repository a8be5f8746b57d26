"""`Optimizer`: what an optimizer that recipes may name says of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from minicpm_megatron.recipe.schema import OptimizerOptions, OptimizerRecipe

FP32 = 4


@dataclass(frozen=True)
class Optimizer:
    """An entry of `registry.OPTIMIZERS`; its module must not import torch at its top.

    Attributes:
        build: (muP groups of parameters, the recipe's optimizer section, whether masters and moments are on the host
            beside a GPU) -> a torch.optim.Optimizer that steps the groups' `params` at their `lr`, shrinks them by
            `weight_decay`, and counts a tensor's updates as `step` in its state. Under ZeRO a group's parameters are
            replaced, after it was built, by one flat tensor that holds a part of them.
        moments: names of the fp32 tensors in a parameter's state, each as large as the parameter.
        moments_of: muP role -> names in the place of `moments` for parameters of that role.
        options: keys of its own, below `optimizer.options`.
        lr_rules: muP role -> one of `methods.mup.LR_RULES`, by which its learning rate follows the width; roles left
            out follow Adam's.
        whole_matrices: muP roles whose updates need whole matrices. What `build` returns then has an attribute
            `matrices`, which the engine sets to an `engine.whole_matrices.WholeMatrices` before the first step: it
            brings the parts that ranks hold together, has a function map each whole matrix, and takes the parts back.
        matrix_copies: fp32 tensors, each as large as the largest weight of those roles, that a step holds at once
            beside the state.
        matrix_flops: (rows, columns, optimizer section) -> FLOPs of that function for one whole matrix; None: counted
            as none.
    """

    build: Callable[[list[dict[str, Any]], OptimizerRecipe, bool], Any]
    moments: tuple[str, ...]
    moments_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    options: type[OptimizerOptions] = OptimizerOptions
    lr_rules: Mapping[str, str] = field(default_factory=dict)
    whole_matrices: tuple[str, ...] = ()
    matrix_copies: float = 0.0
    matrix_flops: Callable[[int, int, OptimizerRecipe], float] | None = None

    def moments_for(self, role: str) -> tuple[str, ...]:
        """Names of the state tensors of a parameter of this muP role."""
        return self.moments_of.get(role, self.moments)

    def state_bytes(self, role: str) -> int:
        """Bytes that the moments take for each parameter of this muP role."""
        return FP32 * len(self.moments_for(role))


def as_optimizer(entry: Any) -> Optimizer:
    """Return a registered object if it is an `Optimizer`.

    Raises:
        TypeError: it is not, or one of its attributes is of another type than documented.
    """
    if not isinstance(entry, Optimizer) or not callable(entry.build):
        raise TypeError(f"{entry!r} is no minicpm_megatron.recipe.optimizer.Optimizer")
    for names in (entry.moments, *entry.moments_of.values()):
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"moments are a tuple of names, not {names!r}")
    if not (isinstance(entry.options, type) and issubclass(entry.options, OptimizerOptions)):
        raise TypeError(f"options are a subclass of OptimizerOptions, not {entry.options!r}")
    return entry
