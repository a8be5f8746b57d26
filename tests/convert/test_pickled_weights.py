"""pytorch_model.bin: read bit by bit, alone and in shards, and nothing in it is ever run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minicpm_megatron.convert import convert, open_source
from minicpm_megatron.convert.pickled_weights import PickledWeights
from minicpm_megatron.errors import UserError
from tests.convert.conftest import MakeCheckpoint, assert_bit_equal, read_checkpoint

INDEX = "pytorch_model.bin.index.json"


@pytest.fixture
def weights(checkpoint: MakeCheckpoint, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a sound llama folder in bf16, which is at tmp_path / "bin" without them."""
    convert(checkpoint(), tmp_path / "llama", "llama")
    shutil.copytree(tmp_path / "llama", tmp_path / "bin")
    for path in (tmp_path / "bin").glob("model.safetensors*"):
        path.unlink()
    return load_file(tmp_path / "llama" / "model.safetensors")


def in_shards(folder: Path, weights: dict[str, torch.Tensor], count: int = 3) -> None:
    names, weight_map = list(weights), {}
    for number in range(count):
        file = f"pytorch_model-{number + 1:05}-of-{count:05}.bin"
        torch.save({name: weights[name] for name in names[number::count]}, folder / file)
        weight_map |= dict.fromkeys(names[number::count], file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def alone(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    # as module.state_dict() gives it: ordered, with an attribute
    state = OrderedDict(weights)
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    torch.save(state, folder / "pytorch_model.bin")


@pytest.mark.parametrize("write", [alone, in_shards])
def test_every_bit_is_that_of_safetensors(
    write: Callable[[Path, dict[str, torch.Tensor]], None], weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    write(tmp_path / "bin", weights)
    for name in ("llama", "bin"):
        convert(tmp_path / name, tmp_path / f"{name}-ours", "megatron")
    assert open_source(tmp_path / "bin").model == open_source(tmp_path / "llama").model
    assert_bit_equal(read_checkpoint(tmp_path / "bin-ours"), read_checkpoint(tmp_path / "llama-ours"))


def test_parameters_views_and_shared_storage(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    saved = {"a": torch.nn.Parameter(base), "b": base, "turned": base.t(), "part": base[1:3]}
    torch.save(saved, tmp_path / "w.bin")
    found = PickledWeights(tmp_path / "w.bin")
    assert found.names() == list(saved)
    for name, tensor in saved.items():
        assert torch.equal(found.read(name), tensor) and found.read(name).is_contiguous()
        assert found.shape(name) == tuple(tensor.shape) and found.stored_type(name) == "F32"
        assert torch.equal(found.rows(name, 1, 2), tensor[1:2])


def test_only_what_is_read_takes_memory(tmp_path: Path) -> None:
    """A file of 400 MB: opening it and reading one small tensor of it, in a process of its own."""
    torch.save({"large": torch.ones(100_000_000), "small": torch.ones(3)}, tmp_path / "w.bin")
    code = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from minicpm_megatron.convert.pickled_weights import PickledWeights\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) >> 10\n"
        "before = peak()\n"
        "found = PickledWeights(Path(sys.argv[1])).read('small')\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "w.bin")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 200  # MiB


class Bomb:
    """What a pickle that runs code looks like."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def compressed(path: Path) -> None:
    """The same archive, compressed, as torch never writes it: a few bytes could stand for gigabytes."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def legacy(path: Path) -> None:
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "code": (lambda path: {"w": Bomb(path.parent / "exploded")}, "names '(posix|os).mkdir', .*nothing was executed"),
    "code as the whole": (lambda path: Bomb(path.parent / "exploded"), "nothing was executed"),
    "a training checkpoint": (
        lambda path: {"state_dict": {"w": torch.ones(2)}, "step": 3},
        "'state_dict' is no tensor",
    ),
    "a list": (lambda path: [torch.ones(2)], "not a dictionary of tensors by name"),
    "numbered": (lambda path: {0: torch.ones(2)}, "not a dictionary of tensors by name"),
    "few bytes for many": (lambda path: {"w": torch.ones(1).expand(10**6, 10**6)}, "larger than what is stored of it"),
    "sparse": (lambda path: {"w": torch.eye(3).to_sparse()}, "nothing was executed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    path = tmp_path / "pytorch_model.bin"
    torch.save(make(path), path)
    with pytest.raises(UserError, match=message) as caught:
        PickledWeights(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (compressed, "not a whole file of torch.save"),
        (legacy, "save it again: python -c"),
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "not a whole file of torch.save"),
        (lambda path: path.write_bytes(b""), "not a file of torch.save"),
        (lambda path: path.unlink(), "missing; download it again"),
    ],
    ids=["compressed", "before torch 1.6", "cut off", "empty", "gone"],
)
def test_files_that_are_not_whole(spoil: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(100)}, path)
    spoil(path)
    with pytest.raises(UserError, match=message) as caught:
        PickledWeights(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_that_is_printed_saves_it_again(tmp_path: Path) -> None:
    path = tmp_path / "it's a folder" / "pytorch_model.bin"
    path.parent.mkdir()
    torch.save({"w": torch.arange(5.0)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError) as caught:
        PickledWeights(path)
    command = str(caught.value).partition("save it again: ")[2]
    subprocess.run(["bash", "-c", command.replace("python", sys.executable, 1)], check=True)
    assert torch.equal(PickledWeights(path).read("w"), torch.arange(5.0))


@pytest.mark.parametrize("name", ["../w.bin", "/etc/w.bin", "model.safetensors", None, "x\0.bin"])
def test_an_index_that_leads_elsewhere(name: Any, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    in_shards(tmp_path / "bin", weights)
    content = json.loads((tmp_path / "bin" / INDEX).read_text())
    content["weight_map"]["model.norm.weight"] = name
    (tmp_path / "bin" / INDEX).write_text(json.dumps(content))
    with pytest.raises(UserError, match="weight_map names .*, not a .bin file of this folder"):
        open_source(tmp_path / "bin")


def test_safetensors_go_before(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save({"w": Bomb(tmp_path / "exploded")}, tmp_path / "llama" / "pytorch_model.bin")
    open_source(tmp_path / "llama")
    assert not (tmp_path / "exploded").exists()
