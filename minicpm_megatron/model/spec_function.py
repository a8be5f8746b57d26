"""Functions that make a block's spec, and are one: Megatron-LM's `--spec MODULE NAME` may name them.

Megatron-LM 0.19's `GPTModelBuilder` calls what `--spec` names with its config. Model providers of other scripts hand it
to `GPTModel` as it is, which knows specs and no functions. There the config is the one of the command line.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from minicpm_megatron.errors import UserError
from minicpm_megatron.model.multipliers import megatron_arguments


class SpecFunction[Spec: TransformerBlockSubmodules](TransformerBlockSubmodules):
    """A function (config, vp_stage) -> block spec that stands for its own result.

    Args:
        function: makes the spec.
    """

    def __init__(self, function: Callable[[Any, int | None], Spec]) -> None:
        functools.update_wrapper(self, function)
        self._function = function

    def __repr__(self) -> str:
        # help() prints this above the docstring, and cuts it where it is long; a dataclass's own asks for the layers
        return f"{getattr(self, '__name__', 'spec')}({', '.join(inspect.signature(self._function).parameters)})"

    def __call__(self, config: Any, vp_stage: int | None = None) -> Spec:
        return self._function(config, vp_stage)

    @property
    def layer_specs(self) -> list[ModuleSpec] | None:
        """Layer specs of the model that Megatron-LM's arguments describe.

        Raises:
            UserError: Megatron-LM's trainer does not run, or it cuts the model into virtual pipeline stages, which only
                a caller of the function can name.
        """
        return self._of_arguments().layer_specs

    @property
    def layer_norm(self) -> Any:
        return self._of_arguments().layer_norm

    def _of_arguments(self) -> Spec:
        name = getattr(self, "__name__", "the spec")
        arguments = megatron_arguments()
        if arguments is None:
            raise UserError(
                f"{name} was not called, and Megatron-LM's trainer does not run",
                where="MiniCPM's layer spec",
                fix=f"give GPTModel {name}(config)",
            )
        if arguments.virtual_pipeline_model_parallel_size is not None:
            raise UserError(
                f"{name} does not know for which virtual pipeline stage it is used",
                where="MiniCPM's layer spec",
                fix=f"give GPTModel {name}(config, vp_stage) in your model provider, or let Megatron-LM's "
                "GPTModelBuilder build the model",
            )
        from megatron.training.arguments import core_transformer_config_from_args

        config: TransformerConfig = core_transformer_config_from_args(arguments)
        return self(config)


def spec_function[Spec: TransformerBlockSubmodules](function: Callable[[Any, int | None], Spec]) -> SpecFunction[Spec]:
    """Decorate a function that makes a block's spec; see `SpecFunction`."""
    return SpecFunction(function)
