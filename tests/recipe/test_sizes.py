"""`model.size` against a row of the presets, and what it refuses."""

from __future__ import annotations

import pytest

from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import build, get_preset
from minicpm_megatron.windtunnel.cells import model_of_size
from tests.recipe.fields import minimal_fields


def test_a_row_of_table_8_is_a_size_of_any_other() -> None:
    # 0.1B: width 768, 16 layers, d_ff 1,920, 12 heads of 64
    scaled = build(minimal_fields(preset="windtunnel-9m", model={"size": "768x16"})).model
    assert scaled == get_preset("windtunnel-0.1b")


def test_it_scales_as_the_wind_tunnel_does_and_explicit_keys_win() -> None:
    base = build(minimal_fields())
    overrides = {key.partition(".")[2]: value for key, value in model_of_size(base, 96, 3).items()}
    assert build(minimal_fields(model={"size": "96x3"})).model == build(minimal_fields(model=overrides)).model
    wide = build(minimal_fields(model={"size": "96X3", "ffn_hidden_size": 100, "num_query_groups": 1})).model
    assert (wide.ffn_hidden_size, wide.num_query_groups, wide.num_layers) == (100, 1, 3)


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ({"size": "512"}, "model.size: '512' is no size; give WIDTHxLAYERS"),
        ({"size": 512}, "model.size: 512 is no size; give WIDTHxLAYERS"),
        ({"size": "0x2"}, "model.size: '0x2' is no size"),
        ({"size": "100x2", "kv_channels": 64}, "model.size: a width of 100 does not divide into heads of 64 channels"),
    ],
)
def test_other_forms_are_refused(model: dict[str, object], line: str) -> None:
    with pytest.raises(UserError) as refusal:
        build(minimal_fields(model=model))
    assert str(refusal.value).startswith(line)


def test_without_a_preset_there_is_nothing_to_scale() -> None:
    fields = minimal_fields(model={"size": "64x2"})
    del fields["preset"]
    with pytest.raises(UserError, match="model.size: scales a preset, and there is none; give a preset"):
        build(fields)
