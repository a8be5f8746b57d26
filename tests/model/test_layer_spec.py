"""The specs without Megatron-LM's trainer: what they are, and what they refuse. `tests/megatron_lm` has the rest."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from minicpm_megatron import MiniCPMConfig, get_minicpm_block_spec, get_minicpm_layer_spec
from minicpm_megatron.errors import UserError
from minicpm_megatron.model.experts import MiniCPMExperts
from minicpm_megatron.model.layer import MiniCPMTransformerLayer
from minicpm_megatron.model.multipliers import multipliers_of
from minicpm_megatron.model.norm import MiniCPMFinalNorm
from minicpm_megatron.recipe import RopeScaling
from tests.convert.conftest import small_model


def test_a_layers_spec_is_a_blocks_too():
    layer = get_minicpm_layer_spec(MiniCPMConfig.from_recipe(small_model()))
    assert isinstance(layer, ModuleSpec) and isinstance(layer, TransformerBlockSubmodules)
    assert layer.module is MiniCPMTransformerLayer and layer.layer_norm is MiniCPMFinalNorm


def test_the_functions_keep_their_signatures():
    for function in (get_minicpm_layer_spec, get_minicpm_block_spec):
        assert list(inspect.signature(function).parameters) == ["config", "vp_stage"]
        assert function.__name__.startswith("get_minicpm") and "GPTModel" in function.__doc__


@pytest.mark.parametrize("function", [get_minicpm_layer_spec, get_minicpm_block_spec])
def test_as_it_is_a_spec_needs_megatrons_arguments(function):
    with pytest.raises(UserError, match=rf"was not called.*give GPTModel {function.__name__}\(config\)"):
        _ = function.layer_specs


def test_a_config_without_the_constants_is_refused():
    plain = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    with pytest.raises(UserError, match="TransformerConfig has no scale_emb.*add_minicpm_args"):
        get_minicpm_layer_spec(plain)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("qk_l2_norm", True), ("normalization", "LayerNorm"), ("attention_dropout", 0.1), ("add_bias_linear", True)],
)
def test_a_setting_that_the_modules_would_ignore_is_refused(setting, value):
    config = MiniCPMConfig.from_recipe(small_model(), **{setting: value})
    with pytest.raises(UserError, match=f"{setting} = .* is not MiniCPM's"):
        get_minicpm_block_spec(config)


@pytest.mark.parametrize(("kind", "refused"), [("ntk", True), ("product", True), ("dynamic", False)])
def test_a_base_that_gptmodel_would_leave_unscaled_is_refused(kind, refused):
    config = MiniCPMConfig.from_recipe(small_model(rope_scaling=RopeScaling(type=kind, factor=2.0)))
    if refused:
        with pytest.raises(UserError, match=f"rope scaling of type {kind}"):
            get_minicpm_layer_spec(config)
    else:
        get_minicpm_layer_spec(config)


def test_a_hybrid_config_counts_transformer_layers():
    config = MiniCPMConfig.from_recipe(small_model())
    hybrid = MiniCPMConfig.from_recipe(small_model(), num_layers=12, is_hybrid_model=True)
    assert multipliers_of(config) == multipliers_of(hybrid)
    assert multipliers_of(config).residual == pytest.approx(1.4 / 6**0.5)
    assert multipliers_of(config).width == pytest.approx(96 / 40)


def test_grouped_experts_wait_for_weights_that_a_hook_brings():
    """Megatron-LM's --overlap-param-gather fetches a module's weights when the module is called."""
    experts = SimpleNamespace(
        num_local_experts=2, local_experts=[SimpleNamespace(linear_fc1=torch.nn.Linear(2, 2)) for _ in range(2)]
    )
    tokens = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    assert MiniCPMExperts._has_kernel(experts, tokens)
    experts.local_experts[0].linear_fc1.register_forward_pre_hook(lambda *_: None)
    assert not MiniCPMExperts._has_kernel(experts, tokens)
