"""Sizes of activations, of their changes and of logits in one model, before and after a few steps.

The coordinate check of Tensor Programs V (arXiv 2203.03466, appendix D.1) on the model, engine and optimizer that
train. Works on the ranks of an initialised job, under any layout without pipeline stages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import Layout, Recipe

if TYPE_CHECKING:
    import torch

QUANTITIES = ("residual", "attention", "mlp", "logits")
Sizes = dict[str, float]


@dataclass(frozen=True)
class Coordinates:
    """Root mean squares over a probe batch: of the residual stream after the last layer, of the outputs of all
    attention and of all MLP blocks (before the residual multiplier), and of the logits. nan where an update was not
    finite.

    Attributes:
        start: at initialisation.
        end: after the steps.
        change: of the difference between the two.
    """

    start: Sizes
    end: Sizes
    change: Sizes


def measure(
    recipe: Recipe,
    layout: Layout,
    batches: Sequence[np.ndarray],
    probe: np.ndarray,
    *,
    spoil: Callable[[Any], None] | None = None,
) -> Coordinates:
    """Train a model on `batches` at the full rate and measure it on `probe`; collective over all ranks.

    Args:
        recipe: model, optimizer and seed; its schedule and data are not looked at.
        batches: each int64 [global batch, sequence + 1]; a rank takes its data-parallel share.
        probe: int64 [samples, sequence + 1]; all ranks take all of it.
        spoil: changes the model before anything is measured, for a control that must fail.

    Raises:
        UserError: the layout has pipeline stages.
    """
    import torch

    from minicpm_megatron.engine.engine import Engine
    from minicpm_megatron.model.config import MiniCPMConfig
    from minicpm_megatron.model.initialize import initialize_parameters
    from minicpm_megatron.model.model import MiniCPMModel
    from minicpm_megatron.parallel import device, groups

    if layout.pipeline_model_parallel_size > 1:
        raise UserError("activations of other stages are not seen", where="parallel.pipeline_model_parallel_size")
    config = MiniCPMConfig.from_recipe(
        recipe.model, recipe.parallel, precision=recipe.training.precision, perform_initialization=False
    )
    model = MiniCPMModel(config)
    initialize_parameters(model, config, recipe.training.seed)
    if spoil is not None:
        spoil(model)
    engine = Engine(model, config, recipe, layout)
    tokens = torch.from_numpy(probe[:, :-1].copy()).to(device.device())
    before = _activations(model, tokens)
    start, applied = _sizes(before, recipe), True
    replicas, replica = layout.data_parallel_size, groups.MegatronMPU().get_data_parallel_rank()
    for batch in batches:
        share = len(batch) // replicas
        own = torch.from_numpy(batch[replica * share : (replica + 1) * share].copy()).to(device.device())
        engine.set_rates(1.0)
        engine.backward(engine.losses(own[:, :-1].contiguous(), own[:, 1:].contiguous()).mean())
        applied = applied and engine.step().applied
    after = _activations(model, tokens)
    change = {name: [b - a for a, b in zip(before[name], after[name], strict=True)] for name in before}
    end, moved = _sizes(after, recipe), _sizes(change, recipe)
    if not applied:
        end, moved = dict.fromkeys(end, math.nan), dict.fromkeys(moved, math.nan)
    return Coordinates(start, end, moved)


def _activations(model: Any, tokens: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """Quantity -> the tensors it is taken over, on this rank."""
    import torch

    seen: dict[str, list[torch.Tensor]] = {name: [] for name in QUANTITIES}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            seen[name].append((output[0] if isinstance(output, tuple) else output).detach().float().clone())

        return hook

    layers = model.decoder.layers
    hooks = [layers[len(layers) - 1].register_forward_hook(keep("residual"))]
    for layer in layers:
        hooks.append(layer.self_attention.register_forward_hook(keep("attention")))
        hooks.append(layer.mlp.register_forward_hook(keep("mlp")))
    with torch.no_grad():
        seen["logits"].append(model(tokens).detach().float())
    for hook in hooks:
        hook.remove()
    return seen


def _sizes(activations: dict[str, list[torch.Tensor]], recipe: Recipe) -> Sizes:
    import torch.distributed as dist

    from minicpm_megatron.parallel import groups

    found = {
        name: math.sqrt(sum(float(each.double().square().mean()) for each in tensors) / len(tensors))
        for name, tensors in activations.items()
        if name != "logits"
    }
    [logits] = activations["logits"]
    # padding of the vocabulary is at its end, so on the last ranks
    mpu, vocabulary = groups.MegatronMPU(), recipe.model.vocab_size
    real = max(0, min(logits.size(-1), vocabulary - mpu.get_model_parallel_rank() * logits.size(-1)))
    square = logits[..., :real].double().square().sum()
    dist.all_reduce(square, group=mpu.get_model_parallel_group())
    found["logits"] = math.sqrt(float(square) / (logits.size(0) * logits.size(1) * vocabulary))
    return found
