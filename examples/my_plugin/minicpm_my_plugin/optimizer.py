"""An optimizer is an `Optimizer`: how it is built, and what it keeps of each parameter. This one is Lion.

Lion (arXiv 2302.06675, algorithm 2) steps by a sign and keeps one tensor a parameter, where Adam keeps two:

    theta <- theta - lr (sign(beta_1 m + (1 - beta_1) g) + weight_decay theta),  m <- beta_2 m + (1 - beta_2) g
"""

from __future__ import annotations

from typing import Any

from minicpm_megatron.recipe import OptimizerRecipe
from minicpm_megatron.recipe.optimizer import Optimizer


def build(groups: list[dict[str, Any]], recipe: OptimizerRecipe, on_host: bool) -> Any:
    """A torch.optim.Optimizer over the muP groups; torch is imported when a run is built, not with its recipe."""
    import torch

    class Lion(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is None:
                        continue
                    state = self.state[parameter]
                    if not state:
                        state["step"] = torch.zeros(())
                        state["momentum"] = torch.zeros_like(parameter)
                    state["step"] += 1
                    first, second = recipe.betas
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(state["momentum"].lerp(parameter.grad, 1 - first).sign(), alpha=-group["lr"])
                    state["momentum"].lerp_(parameter.grad, 1 - second)

    return Lion(groups, {"lr": recipe.lr, "weight_decay": recipe.weight_decay})


lion = Optimizer(build=build, moments=("momentum",))
