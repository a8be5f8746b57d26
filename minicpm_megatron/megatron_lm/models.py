"""MiniCPM's models for Megatron-LM's model builders, from its arguments; and MiniCPM's initial weights."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from megatron.core.transformer.module import MegatronModule
from megatron.training.argument_utils import (
    core_transformer_config_from_args,
    gpt_config_from_args,
    hybrid_config_from_args,
)
from megatron.training.global_vars import get_args, get_tokenizer
from megatron.training.models.base import ModelConfig
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig

from minicpm_megatron.errors import UserError, require
from minicpm_megatron.megatron_lm.arguments import check_arguments
from minicpm_megatron.model.config import MiniCPMConfig
from minicpm_megatron.model.hybrid import MiniCPMHybridModel
from minicpm_megatron.model.initialize import initialize_parameters
from minicpm_megatron.model.model import MiniCPMModel
from minicpm_megatron.recipe import RopeScaling

WHERE = "Megatron-LM's arguments"


class _OwnFields:
    """A model config that keeps its own fields.

    Megatron-LM 0.19's send every attribute that their TransformerConfig has to it, their own fields of the same name
    included: the padded vocab_size would overwrite MiniCPMConfig's.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in {field.name for field in fields(self)}:  # type: ignore[arg-type]
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


@dataclass(kw_only=True)
class MiniCPMModelConfig(_OwnFields, GPTModelConfig):
    """Megatron-LM's model config for `MiniCPMModelBuilder`; `transformer` is a MiniCPMConfig."""

    builder: ClassVar[str] = "minicpm_megatron.megatron_lm.models.MiniCPMModelBuilder"


@dataclass(kw_only=True)
class MiniCPMHybridModelConfig(_OwnFields, HybridModelConfig):
    """Megatron-LM's model config for `MiniCPMHybridModelBuilder`; `transformer` is a MiniCPMConfig."""

    builder: ClassVar[str] = "minicpm_megatron.megatron_lm.models.MiniCPMHybridModelBuilder"


class _Builder:
    """The signature of Megatron-LM's builders over `_build`, which is given a stage's arguments."""

    _model_config: Any
    _build: Callable[..., Any]

    def build_model(
        self,
        pg_collection: Any,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> Any:
        """Build one pipeline stage; see Megatron-LM."""
        given = {"pre_process": pre_process, "post_process": post_process}
        return self._build(
            self._model_config.transformer,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
            parallel_output=self._model_config.parallel_output,
            **{name: value for name, value in given.items() if value is not None},
        )


class MiniCPMModelBuilder(_Builder, GPTModelBuilder):
    """Megatron-LM's GPTModelBuilder for `MiniCPMModel`."""

    _build = MiniCPMModel


class MiniCPMHybridModelBuilder(_Builder, HybridModelBuilder):
    """Megatron-LM's HybridModelBuilder for `MiniCPMHybridModel`."""

    def _build(self, config: MiniCPMConfig, **stage: Any) -> MiniCPMHybridModel:
        return MiniCPMHybridModel(config, self._model_config.hybrid_layer_pattern, **stage)


def minicpm_config_from_args(args: argparse.Namespace) -> MiniCPMConfig:
    """The MiniCPMConfig that Megatron-LM's arguments describe.

    Raises:
        UserError: the vocabulary is smaller than the tokenizer's.
    """
    config: MiniCPMConfig = core_transformer_config_from_args(args, MiniCPMConfig)
    pieces = get_tokenizer().vocab_size
    config.vocab_size = args.vocab_size or pieces
    require(
        pieces <= config.vocab_size,
        WHERE,
        f"the tokenizer has {pieces:,} pieces, the model {config.vocab_size:,} rows",
        "raise --vocab-size",
    )
    config.rope_scaling = RopeScaling(type=args.minicpm_rope_scaling_type, factor=args.minicpm_rope_scaling_factor)
    return config


def minicpm_model_config_from_args(args: argparse.Namespace) -> ModelConfig:
    """Return Megatron-LM's config of `MiniCPMModel`, or with --hybrid-layer-pattern of `MiniCPMHybridModel`.

    Raises:
        UserError: --spec is given, which would be ignored; and see `check_arguments`, `minicpm_config_from_args`.
    """
    check_arguments(args)
    if args.spec is not None:
        raise UserError("--spec is given to a script that builds MiniCPM by itself", where=WHERE, fix="leave it out")
    config = minicpm_config_from_args(args)
    if args.hybrid_layer_pattern is None:
        return gpt_config_from_args(args, config, MiniCPMModelConfig)
    return hybrid_config_from_args(args, config, MiniCPMHybridModelConfig)


def initial_weights(models: Sequence[MegatronModule]) -> list[MegatronModule]:
    """Give models their initial weights (`initialize_parameters`) from Megatron-LM's --seed; a `pre_wrap_hook`.

    Args:
        models: this rank's stages of MiniCPMModel, or of a GPTModel or HybridModel with MiniCPM's spec, not wrapped.

    Raises:
        UserError: the models' vocabulary is padded to another size than MiniCPM's.
    """
    args = get_args()
    config = minicpm_config_from_args(args)
    for model in models:
        for name, parameter in model.named_parameters():
            rows = config.padded_vocab_size() // config.tensor_model_parallel_size
            if name.endswith(("word_embeddings.weight", "output_layer.weight")) and parameter.shape[0] != rows:
                raise UserError(
                    f"{name} has {parameter.shape[0]:,} rows on a rank, --vocab-size needs {rows:,}",
                    where=WHERE,
                    fix=f"give --padded-vocab-size {config.padded_vocab_size()}",
                )
        initialize_parameters(model, config, args.seed)
    return list(models)
