"""Name tables and fused weights: the dense one against counts, and that sparse ones need a table and no code."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from minicpm_megatron.convert import convert
from minicpm_megatron.convert.formats import FORMATS
from minicpm_megatron.convert.fused import GATE_UP, QKV, STACK, Fusion, merge_qkv, split_qkv
from minicpm_megatron.convert.llama_names import DENSE_ROWS
from minicpm_megatron.convert.mapping import Kind, Row, expand
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import count_parameters
from tests.convert.conftest import CASES, EXPERTS, SPARSE_CASES, MakeCheckpoint, named, small_model


@pytest.mark.parametrize("heads, groups", [(8, 8), (8, 4), (8, 2), (8, 1), (6, 3)])
def test_qkv_rows_land_where_the_layout_says(heads: int, groups: int) -> None:
    channels = 2
    names = []  # the name of every row of the fused matrix, from the layout's description
    for group in range(groups):
        names += [f"q{group * (heads // groups) + head}" for head in range(heads // groups)]
        names += [f"k{group}", f"v{group}"]
    code = {name: float(n) for n, name in enumerate(sorted(set(names)))}
    fused = torch.tensor([[code[name], channel] for name in names for channel in range(channels)])
    parts = split_qkv(fused, heads, groups, channels)
    for letter, count, part in zip("qkv", (heads, groups, groups), parts, strict=True):
        expected = [[code[f"{letter}{n}"], channel] for n in range(count) for channel in range(channels)]
        assert part.tolist() == expected
    assert torch.equal(merge_qkv(*parts, groups, channels), fused)


@pytest.mark.parametrize("fusion", [QKV, GATE_UP])
def test_shapes_are_those_of_the_parts(fusion: Fusion) -> None:
    model = small_model()
    row = next(row for row in DENSE_ROWS if row.fusion is fusion)
    tensor = torch.randn(row.kind.shape(model))
    parts = fusion.split([tensor], model)
    assert tuple(tuple(part.shape) for part in parts) == fusion.shapes(tuple(tensor.shape), model)
    assert torch.equal(fusion.merge(parts, model)[0], tensor)


@pytest.mark.parametrize(**named(CASES))
@pytest.mark.parametrize("untied", [False, True])
def test_every_parameter_is_in_the_table_once(target: str, kind: dict[str, Any], untied: bool) -> None:
    model = small_model(untie_embeddings_and_output_weights=untied, **kind)
    groups = FORMATS[target].import_groups(model)
    names = [canonical for group in groups for canonical in group.canonical]
    assert len(names) == len(set(names))
    published = [shape for group in groups for shape in group.published_shapes(model).values()]
    assert sum(torch.Size(shape).numel() for shape in published) == count_parameters(model).total


def test_reading_order_is_layer_by_layer() -> None:
    names = [name for group in expand(DENSE_ROWS, small_model()) for name in group.published]
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers) and set(layers) == set(range(6))
    assert names[0] == "model.embed_tokens.weight" and names[-2:] == ["model.norm.weight", "lm_head.weight"]


_EXPERT = Kind("decoder.layers.*.experts.*.fc2.weight", lambda m: (m.hidden_size, m.ffn_hidden_size))


def _sparse() -> tuple:
    model = small_model(num_moe_experts=3, num_layers=2)
    generator = torch.Generator().manual_seed(0)
    experts = [torch.randn(_EXPERT.shape(model), generator=generator) for _ in range(3)]
    return model, experts


def test_experts_one_by_one_are_a_second_wildcard() -> None:
    model, _ = _sparse()
    groups = expand((Row(_EXPERT, ("model.layers.*.experts.*.w2.weight",)),), model)
    assert [(group.canonical, group.published) for group in groups] == [
        ((f"decoder.layers.{layer}.experts.{e}.fc2.weight",), (f"model.layers.{layer}.experts.{e}.w2.weight",))
        for layer in range(2)
        for e in range(3)
    ]


def test_experts_stacked_are_one_published_tensor() -> None:
    model, experts = _sparse()
    first, second = expand((Row(_EXPERT, ("model.layers.*.output_linear.weight",), STACK, lambda m: 0.5),), model)
    assert first.canonical == tuple(f"decoder.layers.0.experts.{e}.fc2.weight" for e in range(3))
    assert second.published == ("model.layers.1.output_linear.weight",)
    published = first.to_published(experts, model)
    tensor = published["model.layers.0.output_linear.weight"]
    assert tuple(tensor.shape) == first.published_shapes(model)["model.layers.0.output_linear.weight"]
    assert torch.equal(tensor[1], experts[1] * 0.5)
    back = first.to_canonical([tensor], model)
    assert all(torch.equal(back[name], expert) for name, expert in zip(first.canonical, experts, strict=True))


@pytest.mark.parametrize("target", [name for name, layout in FORMATS.items() if not layout.sparse_rows])
def test_a_dense_format_refuses_a_mixture(target: str, checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{target}: this .* dense models only; use minicpm or mixtral or granitemoe$"):
        convert(checkpoint(**EXPERTS), tmp_path / "out", target)


@pytest.mark.parametrize("target", [name for name, layout in FORMATS.items() if not layout.rows])
def test_a_format_of_mixtures_refuses_a_dense_model(target: str, checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{target}: .* mixtures of experts only; use minicpm or llama or granite$"):
        convert(checkpoint(), tmp_path / "out", target)


@pytest.mark.parametrize(**named(SPARSE_CASES))
def test_weights_that_are_not_renormalised_fit_no_format(
    target: str, kind: dict[str, Any], checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = checkpoint(**kind, moe_router_pre_softmax=True)
    with pytest.raises(UserError, match=f"--to {target}: .*moe_router_pre_softmax leaves them as they are"):
        convert(folder, tmp_path / "out", target)
    assert not (tmp_path / "out").exists()


def test_formats_are_found_by_what_identifies_them() -> None:
    keys = {(f.model_type, f.architecture) for f in FORMATS.values()}
    assert len(keys) == len(FORMATS) and all(dataclasses.is_dataclass(f) for f in FORMATS.values())
