"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): hidden matrices by Muon, everything else by AdamW.

A hidden matrix, an expert's too, steps by its momentum with all singular values brought near 1. Query, key, value, gate
and up are matrices of their own, though Megatron-Core keeps them in fused weights. Learning rates follow the spectral
rule of `methods.mup`; `update_rms` scales its updates so that one base learning rate serves both halves (Moonlight,
arXiv 2502.16982).
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from minicpm_megatron.recipe import OptimizerOptions, OptimizerRecipe
from minicpm_megatron.recipe.load import build_options
from minicpm_megatron.recipe.optimizer import Optimizer
from minicpm_megatron.recipe.schema import Fraction, Positive

MATRICES = ("hidden", "expert")
MOMENTUM = ("momentum_buffer",)


class MuonOptions(OptimizerOptions):
    """Keys of `optimizer.options` for muon."""

    momentum: Fraction = 0.95
    """Decay rate of the momentum of hidden matrices (Jordan et al. 2024)."""
    nesterov: bool = True
    """Nesterov's momentum: step by momentum x M + (1 - momentum) x gradient instead of M (Jordan et al. 2024)."""
    ns_steps: Annotated[int, Field(ge=1, le=20)] = 5
    """Newton-Schulz iterations (Jordan et al. 2024)."""
    update_rms: Positive = 0.2
    """Root mean square of the entries of a square hidden matrix's update relative to its learning rate, at width
    dim_model_base; AdamW's are 0.2 to 0.4 (arXiv 2502.16982, section 2.2)."""


def build(groups: list[dict[str, Any]], recipe: OptimizerRecipe, on_host: bool) -> Any:
    """As `Optimizer.build`."""
    from minicpm_megatron.engine.muon import Muon

    options = build_options(MuonOptions, recipe.options, key="optimizer.options")
    return Muon(
        groups,
        MATRICES,
        lr=recipe.lr,
        betas=recipe.betas,
        eps=recipe.eps,
        momentum=options.momentum,
        nesterov=options.nesterov,
        ns_steps=options.ns_steps,
        update_rms=options.update_rms,
    )


def newton_schulz_flops(rows: int, columns: int, recipe: OptimizerRecipe) -> float:
    """FLOPs: an iteration has two products of the matrix and its smaller Gram matrix, and one of that with itself."""
    short, long = sorted((rows, columns))
    options = build_options(MuonOptions, recipe.options, key="optimizer.options")
    return options.ns_steps * 2 * short * short * (2 * long + short)


OPTIMIZER = Optimizer(
    build=build,
    moments=("exp_avg", "exp_avg_sq"),
    moments_of=dict.fromkeys(MATRICES, MOMENTUM),
    options=MuonOptions,
    lr_rules=dict.fromkeys(MATRICES, "spectral"),
    whole_matrices=MATRICES,
    matrix_copies=3.0,
    matrix_flops=newton_schulz_flops,
)
