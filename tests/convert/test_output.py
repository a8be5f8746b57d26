"""Shards, and an output folder that is whole or not there."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from minicpm_megatron.convert import convert
from minicpm_megatron.convert.operation import parse_size
from minicpm_megatron.convert.weight_files import plan_shards, write_weights
from minicpm_megatron.errors import UserError
from tests.convert.conftest import MakeCheckpoint, assert_bit_equal, random_tensors, read_checkpoint, small_model


def test_small_shards_hold_the_same_model(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = checkpoint()
    convert(folder, tmp_path / "one", "granite", dtype="fp32")
    convert(folder, tmp_path / "many", "granite", dtype="fp32", max_shard_size="200KB")
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 5
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    many: dict[str, torch.Tensor] = {}
    for file in files:
        content = load_file(tmp_path / "many" / file)
        assert {name for name, where in index["weight_map"].items() if where == file} == set(content)
        assert len(content) == 1 or sum(t.nbytes for t in content.values()) <= 200_000
        many |= content
    assert_bit_equal(load_file(tmp_path / "one" / "model.safetensors"), many)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in many.values())
    convert(tmp_path / "many", tmp_path / "back", "megatron")
    assert_bit_equal(random_tensors(small_model()), read_checkpoint(tmp_path / "back"))


def test_transformers_loads_many_shards(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    convert(checkpoint(), tmp_path / "many", "llama", dtype="fp32", max_shard_size="300KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "many")
    expected = random_tensors(small_model())["embedding.word_embeddings.weight"] * 12
    assert torch.equal(model.get_input_embeddings().weight, expected)


def test_only_one_tensor_is_in_memory(tmp_path: Path) -> None:
    """Each tensor is gone before the next one is asked for, within a shard and between shards."""
    shapes = {f"t{n}": (16, 16) for n in range(6)}
    alive: list[weakref.ref[torch.Tensor]] = []
    seen: list[int] = []

    def tensors():
        for n, name in enumerate(shapes):
            seen.append(sum(reference() is not None for reference in alive))
            tensor = torch.full((16, 16), float(n))
            alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    write_weights(tmp_path, tensors(), shapes, "fp32", 2 * 16 * 16 * 4)
    assert seen == [0] * 6
    content = [load_file(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert [sorted(tensors) for tensors in content] == [["t0", "t1"], ["t2", "t3"], ["t4", "t5"]]
    assert all(torch.equal(t, torch.full((16, 16), float(name[1:]))) for c in content for name, t in c.items())


def test_plan_never_exceeds_the_limit_but_for_single_tensors() -> None:
    shapes = {"a": (10,), "b": (30,), "c": (5,), "d": (5,), "e": (10,)}
    assert [names for _, names in plan_shards(shapes, 1, 20)] == [["a"], ["b"], ["c", "d", "e"]]


@pytest.mark.parametrize(
    "text, size", [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("200kb", 200_000), ("7_000", 7000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GB", "5 apples", "GB", "_"])
def test_not_a_size(text: str) -> None:
    with pytest.raises(UserError, match="--max-shard-size"):
        parse_size(text)


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix in {".part", ".replaced"}}


def test_a_failure_in_the_middle_leaves_what_was_there(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = random_tensors(small_model())
    tensors["decoder.layers.5.mlp.linear_fc2.weight"][3, 3] = float("nan")
    broken, good = checkpoint("broken", tensors=tensors), checkpoint("good")
    convert(good, tmp_path / "out", "llama")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match=r"layers\.5\.mlp\.down_proj\.weight has values that are not finite"):
        convert(broken, tmp_path / "out", "llama", overwrite=True, max_shard_size="100KB")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(UserError, match="not finite"):
        convert(broken, tmp_path / "new", "llama")
    assert not (tmp_path / "new").exists() and not leftovers(tmp_path)


def test_a_value_that_fp16_cannot_hold(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    tensors = random_tensors(small_model())
    tensors["embedding.word_embeddings.weight"][0, 0] = 60_000.0
    folder = checkpoint(tensors=tensors)
    convert(folder, tmp_path / "granite", "granite", dtype="fp16")
    with pytest.raises(UserError, match="beyond the range of fp16; use bf16"):
        convert(folder, tmp_path / "llama", "llama", dtype="fp16")


def test_overwrite_replaces_a_model_and_nothing_else(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder, out = checkpoint(), tmp_path / "out"
    convert(folder, out, "llama", max_shard_size="100KB")
    with pytest.raises(UserError, match="not empty; give another one, or --overwrite"):
        convert(folder, out, "llama")
    convert(folder, out, "granite", overwrite=True)
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]
    convert(out, tmp_path / "back", "megatron")
    convert(out, tmp_path / "back", "megatron", overwrite=True)
    assert_bit_equal(
        read_checkpoint(tmp_path / "back"),
        {name: tensor.bfloat16().float() for name, tensor in random_tensors(small_model()).items()},
    )
    assert not leftovers(tmp_path)
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.tex").write_text("...")
    with pytest.raises(UserError, match="not a model"):
        convert(folder, precious, "llama", overwrite=True)
    assert (precious / "thesis.tex").exists()


def test_the_input_is_never_the_output(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = checkpoint()
    for output in (folder, tmp_path, tmp_path / "x" / ".." / "ours"):
        with pytest.raises(UserError, match="would replace the input"):
            convert(folder, output, "llama", overwrite=True)


def test_a_place_that_cannot_be_written(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = checkpoint()
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="the output is a file"):
        convert(folder, tmp_path / "file", "llama", overwrite=True)
    with pytest.raises(UserError, match="cannot be written"):
        convert(folder, tmp_path / "file" / "below", "llama")
    assert (tmp_path / "file").read_text() == "x"


def test_too_little_space_is_found_before_anything_is_written(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"[\d,]{7,} bytes are needed and 1,000 are free"):
        convert(folder, tmp_path / "deep" / "out", "llama")
    assert not (tmp_path / "deep").exists()


def test_what_a_killed_conversion_left_is_cleared(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "half.safetensors").write_text("half")
    convert(checkpoint(), tmp_path / "out", "llama")
    assert not leftovers(tmp_path) and not (tmp_path / "out" / "half.safetensors").exists()
