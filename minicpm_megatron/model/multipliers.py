"""The three forward multipliers of MiniCPM (Table 7 of arXiv 2404.06395), for MiniCPMConfig and TransformerConfig.

A `MiniCPMConfig` holds the constants that decide them. Megatron-LM's own trainer builds a plain `TransformerConfig`
from its command line; there the constants are those of its global arguments (`megatron_lm.arguments` adds them).
"""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import dataclass
from typing import Any, Literal

from megatron.core.transformer.transformer_config import TransformerConfig

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods import mup

CONSTANTS = ("scale_emb", "scale_depth", "dim_model_base", "parametrization")


@dataclass(frozen=True)
class Multipliers:
    """Factors of the forward pass.

    Attributes:
        embedding: on the output of the word embedding (scale_emb).
        residual: on the output of every attention and MLP block (scale_depth / sqrt(transformer layers)).
        width: m = hidden_size / dim_model_base; the final norm's output is divided by it.
    """

    embedding: float
    residual: float
    width: float


def transformer_layers(config: TransformerConfig) -> int:
    """L, the number of transformer layers. `HybridModel` counts an attention and an MLP block as two layers."""
    return config.num_layers // 2 if config.is_hybrid_model else config.num_layers


def megatron_arguments() -> Namespace | None:
    """The global arguments of Megatron-LM's trainer, or None where it does not run."""
    module: Any = sys.modules.get("megatron.training.global_vars")
    if module is None:
        return None
    try:
        arguments: Namespace = module.get_args()
    except AssertionError:  # imported, but no arguments were parsed
        return None
    return arguments


def multipliers_of(config: TransformerConfig) -> Multipliers:
    """The multipliers of the model that `config` describes.

    Raises:
        UserError: neither the config nor Megatron-LM's arguments hold the constants, or the arguments describe a model
            of another depth.
    """
    constants: Any = config
    if not all(hasattr(config, name) for name in CONSTANTS):
        constants = megatron_arguments()
        if constants is None or not all(hasattr(constants, name) for name in CONSTANTS):
            raise UserError(
                f"{type(config).__name__} has no {', '.join(CONSTANTS[:3])}",
                where="MiniCPM's layer spec",
                fix="build a MiniCPMConfig, or give Megatron-LM extra_args_provider=add_minicpm_args "
                "(minicpm_megatron.megatron_lm)",
            )
        if constants.num_layers != config.num_layers:
            raise UserError(
                f"the config has {config.num_layers} layers, Megatron-LM's arguments have {constants.num_layers}",
                where="MiniCPM's layer spec",
                fix="build a MiniCPMConfig for a model that is not the one of the command line",
            )
    width = _Width(config.hidden_size, constants.dim_model_base, constants.parametrization)
    return Multipliers(
        embedding=constants.scale_emb,
        residual=mup.residual_multiplier(constants.scale_depth, transformer_layers(config)),
        width=mup.width_multiplier(width),
    )


@dataclass(frozen=True)
class _Width:
    hidden_size: int
    dim_model_base: int
    parametrization: Literal["mup", "standard"]
