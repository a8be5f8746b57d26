"""Golden rows: the published sizes to the digit."""

from __future__ import annotations

from decimal import Decimal

import pytest

from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import PRESETS, count_parameters, get_preset

# Table 2: non-embedding parameters, d_model, d_ff, d_head, n_q, n_kv, layers
TABLE_2 = {
    "minicpm-1.2b": (1_247_442_432, 1536, 3840, 64, 24, 8, 52),
    "minicpm-2.4b": (2_442_057_984, 2304, 5760, 64, 36, 36, 40),
}
# Table 8: N in billions as printed, d_model, d_ff, heads, layers
TABLE_8 = {
    "windtunnel-9m": ("0.009", 320, 800, 5, 8),
    "windtunnel-30m": ("0.036", 512, 1280, 8, 12),
    "windtunnel-70m": ("0.066", 640, 1600, 10, 14),
    "windtunnel-0.1b": ("0.109", 768, 1920, 12, 16),
    "windtunnel-0.17b": ("0.166", 896, 2240, 14, 18),
    "windtunnel-0.2b": ("0.241", 1024, 2560, 16, 20),
    "windtunnel-0.5b": ("0.499", 1344, 3360, 21, 24),
}


@pytest.mark.parametrize("name", TABLE_2)
def test_table_2_to_the_last_digit(name: str) -> None:
    model = get_preset(name)
    shape = (
        count_parameters(model).non_embedding,
        model.hidden_size,
        model.ffn_hidden_size,
        model.kv_channels,
        model.num_attention_heads,
        model.num_query_groups,
        model.num_layers,
    )
    assert shape == TABLE_2[name]


@pytest.mark.parametrize("name", TABLE_8)
def test_table_8_as_it_is_rounded(name: str) -> None:
    printed, *shape = TABLE_8[name]
    model = get_preset(name)
    assert [model.hidden_size, model.ffn_hidden_size, model.num_attention_heads, model.num_layers] == shape
    assert (model.kv_channels, model.num_query_groups) == (64, model.num_attention_heads)
    billions = Decimal(count_parameters(model).non_embedding) / 10**9
    # the table rounds the first row down (0.0094) and all others to the nearest
    assert abs(billions - Decimal(printed)) <= Decimal("0.0005")


def test_constants_that_the_family_shares() -> None:
    for name in PRESETS:
        model = PRESETS[name]
        constants = (model.scale_emb, model.scale_depth, model.dim_model_base, model.init_method_std)
        assert constants == (12.0, 1.4, 256, 0.1), name
        assert (model.norm_epsilon, model.parametrization) == (1e-5, "mup"), name
        assert model.ffn_hidden_size * 2 == model.hidden_size * 5, name


def test_long_context_model_has_a_head_of_its_own() -> None:
    counts = count_parameters(get_preset("minicpm-2.4b-128k"))
    assert counts.head == counts.embedding == 122_753 * 2304
    assert counts.total == 2_442_057_984 + 2 * 122_753 * 2304


def test_the_released_long_context_model_has_seven_more_rows_at_both_ends() -> None:
    trained, released = get_preset("minicpm-2.4b-128k"), get_preset("minicpm-2.4b-128k-released")
    assert count_parameters(released).total == 2_442_057_984 + 2 * 122_760 * 2304
    differing = {name for name, value in released if value != getattr(trained, name)}
    assert differing == {"vocab_size"}


def test_long_context_model_has_the_released_positions() -> None:
    model = get_preset("minicpm-2.4b-128k")
    assert (model.max_position_embeddings, model.rotary_base) == (65_536, 1e6)
    assert (model.rope_scaling.type, model.rope_scaling.factor) == ("dynamic", 4.0)


def test_mixture_of_experts_is_the_dense_model_with_seven_more_mlps_and_a_router() -> None:
    dense, moe = (count_parameters(get_preset(name)) for name in ("minicpm-2.4b", "minicpm-moe-8x2b"))
    mlp, router = 3 * 2304 * 5760, 8 * 2304
    assert moe.non_embedding == dense.non_embedding + 40 * (7 * mlp + router)
    assert moe.active_non_embedding == dense.non_embedding + 40 * (mlp + router)
    assert round(moe.non_embedding / 1e9, 1) == 13.6


def test_counts_of_a_grouped_untied_model_against_a_list_of_its_tensors() -> None:
    model = get_preset("minicpm-nano").model_copy(update={"untie_embeddings_and_output_weights": True})
    layer = [(64,), ((4 + 2 * 2) * 16, 64), (64, 64), (64,), (2 * 160, 64), (64, 160)]
    tensors = [(512, 64), *(layer * 2), (64,), (512, 64)]
    sizes = [shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in tensors]
    assert count_parameters(model).total == sum(sizes)
    assert count_parameters(model).non_embedding == sum(sizes[1:-1])


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown preset 'minicpm-2.4'; did you mean minicpm-2.4b"):
        get_preset("minicpm-2.4")
    assert "minicpm-2.4" not in PRESETS
