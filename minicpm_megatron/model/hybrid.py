"""MiniCPM as Megatron-Core's HybridModel: an attention layer and an MLP layer (or experts) in turn.

GPTModel takes critical fixes only since Megatron-Core 0.19, and HybridModel is what replaces it. This form computes
what `MiniCPMModel` computes, bit for bit on a CPU; `hybrid_names` maps the names of its parameters both ways.

On Megatron-LM's command line:

    --hybrid-layer-pattern '*-*-*-*-' --spec minicpm_megatron.model.hybrid get_minicpm_hybrid_stack_spec
"""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from minicpm_megatron.errors import UserError, require
from minicpm_megatron.model.config import MiniCPMConfig
from minicpm_megatron.model.ends import MiniCPMEnds
from minicpm_megatron.model.layer import MiniCPMTransformerLayer
from minicpm_megatron.model.layer_spec import MiniCPMSpecProvider, attention_submodules, mlp_submodules
from minicpm_megatron.model.multipliers import transformer_layers
from minicpm_megatron.model.norm import MiniCPMFinalNorm
from minicpm_megatron.model.supported import check_plain_model


def hybrid_pattern(config: TransformerConfig) -> str:
    """Megatron-Core's pattern of the model: `*-`, or `*E` with experts, once for each transformer layer.

    Where as many blocks fit on every pipeline stage, `|` says where stages end.
    """
    pattern = (Symbols.ATTENTION + _second(config)) * transformer_layers(config)
    each, rest = divmod(len(pattern), config.pipeline_model_parallel_size)
    return pattern if rest else Symbols.PIPE.join(pattern[at : at + each] for at in range(0, len(pattern), each))


def _second(config: TransformerConfig) -> str:
    return Symbols.MLP if config.num_moe_experts is None else Symbols.MOE


class MiniCPMHybridStack(HybridStack):
    """A HybridStack with MiniCPM's final norm; Megatron-Core 0.19's builds Transformer Engine's in every stack.

    Args:
        in_minicpm_model: whether a `MiniCPMHybridModel` is around it, and no plain HybridModel.

    Raises:
        UserError: the layers are not MiniCPM's: attention at even places, an MLP (or experts) at odd ones.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        *,
        layer_type_list: list[str],
        pp_layer_offset: int = 0,
        post_layer_norm: bool = True,
        in_minicpm_model: bool = False,
        **keywords: Any,
    ) -> None:
        if not in_minicpm_model:
            check_plain_model(config)
            # the spec is one object for every config, and has no norm of queries and keys
            require(not config.qk_layernorm, "qk_layernorm", "HybridModel's spec has none", "build MiniCPMHybridModel")
        pair = (Symbols.ATTENTION, _second(config))
        if not config.is_hybrid_model or any(
            kind != pair[(pp_layer_offset + place) % 2] for place, kind in enumerate(layer_type_list)
        ):
            raise UserError(
                f"{''.join(layer_type_list)} after {pp_layer_offset} layers is no part of MiniCPM",
                where="hybrid_layer_pattern",
                fix=f"repeat {''.join(pair)} once for each transformer layer, and leave is_hybrid_model on",
            )
        super().__init__(
            config,
            submodules,
            layer_type_list=layer_type_list,
            pp_layer_offset=pp_layer_offset,
            post_layer_norm=False,
            **keywords,
        )
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = MiniCPMFinalNorm(config, config.hidden_size, config.layernorm_epsilon)


class HybridStackSpec(ModuleSpec):
    """A ModuleSpec that returns itself when it is called: `--spec` hands its object over as it is.

    Give the object to HybridModel as hybrid_stack_spec, or call it with a config.
    """

    def __call__(self, config: TransformerConfig | None = None) -> ModuleSpec:
        """The spec of layers and final norm, as `HybridModel`'s hybrid_stack_spec; the same for every config."""
        return self


def _hybrid_stack_spec(*, qk_layernorm: bool = False, **params: Any) -> HybridStackSpec:
    backend = MiniCPMSpecProvider()

    def layer(**blocks: Any) -> ModuleSpec:
        return ModuleSpec(
            module=MiniCPMTransformerLayer,
            params={"in_plain_model": not params.get("in_minicpm_model", False)},
            submodules=TransformerLayerSubmodules(**blocks),
        )

    return HybridStackSpec(
        module=MiniCPMHybridStack,
        params=params,
        submodules=HybridStackSubmodules(
            attention_layer=layer(**attention_submodules(backend, qk_layernorm=qk_layernorm)),
            mlp_layer=layer(**mlp_submodules(backend, sparse=False)),
            moe_layer=layer(**mlp_submodules(backend, sparse=True)),
        ),
    )


get_minicpm_hybrid_stack_spec = _hybrid_stack_spec()


def hybrid_config(config: MiniCPMConfig) -> MiniCPMConfig:
    """The config as HybridModel counts its layers: two for each transformer layer."""
    if config.is_hybrid_model:
        return config
    hybrid = copy.copy(config)
    hybrid.num_layers = 2 * config.num_layers
    hybrid.is_hybrid_model = True
    return hybrid


class MiniCPMHybridModel(MiniCPMEnds, HybridModel):
    """MiniCPM as a HybridModel; arguments and results as of `MiniCPMModel`.

    Args:
        config: shape, multipliers and layout; num_layers counts transformer layers.
        hybrid_layer_pattern: default: `hybrid_pattern(config)`. One with `|` says where pipeline stages end.
        keywords: passed on to HybridModel: pre_process, post_process, parallel_output, pg_collection, vp_stage.

    Raises:
        UserError: any other keyword.
    """

    def __init__(self, config: MiniCPMConfig, hybrid_layer_pattern: str | None = None, **keywords: Any) -> None:
        self.check_keywords(keywords)
        super().__init__(
            config=hybrid_config(config),
            hybrid_stack_spec=_hybrid_stack_spec(qk_layernorm=config.qk_layernorm, in_minicpm_model=True),
            hybrid_layer_pattern=hybrid_layer_pattern or hybrid_pattern(config),
            **self.arguments(config),
            **keywords,
        )
        self.replace_ends()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        **keywords: Any,
    ) -> Tensor:
        """Loss per token, or logits without labels; see `MiniCPMModel.forward`."""
        if labels is None or not self.post_process or not self.config.fused_loss:
            return super().forward(
                input_ids, position_ids, attention_mask, labels=labels, loss_mask=loss_mask, **keywords
            )
        # HybridModel.forward has no place between the final norm and the logits where the loss could be taken, except
        # that a stage without a head returns what it has there
        self.post_process = False
        try:
            hidden_states = super().forward(input_ids, position_ids, attention_mask, **keywords)
        finally:
            self.post_process = True
        return self.fused_losses(hidden_states, labels, loss_mask)
