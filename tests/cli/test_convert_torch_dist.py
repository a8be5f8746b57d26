"""tools/convert_checkpoint.py and torch_dist folders: both ways, and everything that can be wrong with one."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from minicpm_megatron.convert import convert, open_source
from minicpm_megatron.recipe import ModelRecipe, build, dump_recipe
from minicpm_megatron.storage.sharded import write_single
from tests.cli.commands import Mistake, check_mistake, command, untouched
from tests.convert.conftest import assert_bit_equal, random_tensors, read_checkpoint, small_model

MODEL = small_model(num_layers=2)
TOOL = "convert_checkpoint.py"
RELEASE, METADATA, DATA = Path("megatron/release"), "megatron/release/.metadata", "megatron/release/__0_0.distcp"
EMBEDDING, FC1 = "embedding.word_embeddings.weight", "decoder.layers.mlp.linear_fc1.weight"
COMMON = "common_state/shard_0_1"


def recipe_of(model: ModelRecipe) -> str:
    """A recipe with this model."""
    recipe = {
        "name": "any",
        "model": model.model_dump(mode="json"),
        "data": {"train": [{"prefix": "data/train"}], "sequence_length": 32},
        "training": {"global_batch_size": 8, "micro_batch_size": 2},
        "schedule": {"total": 100, "warmup": 5, "decay": 10, "decay_shape": "linear"},
    }
    return dump_recipe(build(recipe))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ours/, a checkpoint; megatron/, what --to torch_dist makes of it; recipe.yaml, a recipe with its model."""
    folder = tmp_path_factory.mktemp("sound")
    write_single(
        folder / "ours", random_tensors(MODEL).items(), MODEL.model_dump(mode="json"), {"step": 0, "tokens": 0}
    )
    convert(folder / "ours", folder / "megatron", "torch_dist")
    (folder / "recipe.yaml").write_text(recipe_of(MODEL))
    return folder


def test_both_ways(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command(TOOL, "--input", "ours", "--to", "torch_dist", "--output", "out") == 0
    output = capfd.readouterr()
    assert output.out.startswith("megatron -> torch_dist: ") and output.err == ""
    forget_the_model(here)
    for number, source in enumerate(("megatron", "megatron/release", "out")):
        told = () if source == "out" else ("--recipe", "recipe.yaml")
        arguments = ("--input", source, "--to", "megatron", "--output", f"back-{number}", *told)
        assert command(TOOL, *arguments) == 0
        assert capfd.readouterr().out.startswith("torch_dist -> megatron: ")
        assert_bit_equal(read_checkpoint(here / f"back-{number}"), random_tensors(MODEL))
        assert open_source(here / f"back-{number}").model == MODEL


def edit_metadata(folder: Path, change: Callable[[Metadata], object]) -> None:
    """Change the table of contents of megatron/release."""
    metadata = FileSystemReader(folder / RELEASE).read_metadata()
    metadata.storage_meta = None
    change(metadata)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


def edited(change: Callable[[Metadata], object]) -> Callable[[Path], object]:
    return lambda folder: edit_metadata(folder, change)


def forget_the_model(folder: Path) -> None:
    """As in a checkpoint of Megatron-Core alone: no arguments and no note."""

    def forget(metadata: Metadata) -> None:
        del metadata.state_dict_metadata[COMMON], metadata.storage_data[MetadataIndex(COMMON)]

    edit_metadata(folder, forget)


def point_to(folder: Path, name: str, content: bytes) -> None:
    """Append a value to the file of data, and let the table of contents name it as `name`'s."""
    start = (folder / DATA).stat().st_size
    with open(folder / DATA, "ab") as handle:
        handle.write(content)

    def change(metadata: Metadata) -> None:
        index = next(index for index in metadata.storage_data if index.fqn == name)
        info = metadata.storage_data[index]
        metadata.storage_data[index] = dataclasses.replace(info, offset=start, length=len(content))

    edit_metadata(folder, change)


class Bomb:
    """An object that would make a folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("made",)


def saved(value: Any) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def write(name: str, content: bytes | str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size * 2 // 3)


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def damage_a_chunk(folder: Path) -> None:
    with open(folder / DATA, "r+b") as handle:
        info = FileSystemReader(folder / RELEASE).read_metadata().storage_data[MetadataIndex(EMBEDDING, (0, 0))]
        handle.seek(info.offset)
        handle.write(b"\0" * 400)


def older_format(folder: Path) -> None:
    (folder / "old" / "mp_rank_00").mkdir(parents=True)
    (folder / "old" / "mp_rank_00" / "model_optim_rng.pt").write_bytes(saved({"model": Bomb()}))


def chunks(metadata: Metadata) -> list[Any]:
    return metadata.state_dict_metadata[FC1].chunks  # type: ignore[union-attr]


def overlap(metadata: Metadata) -> None:
    """The second layer's chunk a second time in the place of the first one's."""
    first, second = chunks(metadata)
    metadata.storage_data[MetadataIndex(FC1, (1, 0, 1))] = metadata.storage_data[MetadataIndex(FC1, second.offsets)]
    half = torch.Size((1, second.sizes[1], second.sizes[2] - 1))
    chunks(metadata)[:] = [first, second, dataclasses.replace(second, offsets=torch.Size((1, 0, 1)), sizes=half)]


def lie_about_a_shape(metadata: Metadata) -> None:
    tensor: Any = metadata.state_dict_metadata[EMBEDDING]
    tensor.properties.dtype = torch.float16


def elsewhere(metadata: Metadata) -> None:
    for index, info in metadata.storage_data.items():
        metadata.storage_data[index] = dataclasses.replace(info, relative_path="../release/__0_0.distcp")


def stored_as(metadata: Metadata) -> None:
    tensor: Any = metadata.state_dict_metadata[EMBEDDING]
    tensor.properties.dtype = torch.int8


def a_bias(metadata: Metadata) -> None:
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc1.bias"] = metadata.state_dict_metadata[FC1]
    for chunk in chunks(metadata):
        index = MetadataIndex("decoder.layers.mlp.linear_fc1.bias", chunk.offsets)
        metadata.storage_data[index] = metadata.storage_data[MetadataIndex(FC1, chunk.offsets)]


def without(key: str) -> Callable[[Metadata], object]:
    return lambda metadata: metadata.state_dict_metadata.pop(key)


def checksums(folder: Path) -> None:
    files = {".metadata": "0" * 64}
    (folder / RELEASE / "integrity.json").write_text(json.dumps({"algorithm": "sha256", "files": files}))


def move_ours(folder: Path) -> None:
    shutil.copytree(folder / "ours", folder / "out")


def another_model(**changes: Any) -> Callable[[Path], object]:
    """recipe.yaml with another model, and nothing in the checkpoint to compare it with but shapes."""

    def change(folder: Path) -> None:
        forget_the_model(folder)
        (folder / "recipe.yaml").write_text(recipe_of(small_model(**{"num_layers": 2} | changes)))

    return change


BACK = {"--input": "megatron", "--to": "megatron", "--output": "out"}
TOLD = BACK | {"--recipe": "recipe.yaml"}
BOMB = "names 'posix.mkdir', which has no place in it; nothing was executed"
EXPERTS = {"num_moe_experts": 4, "moe_ffn_hidden_size": 72}

CASES: dict[str, Mistake] = {
    # the model
    "not said": (
        TOOL,
        BACK,
        forget_the_model,
        "does not contain MiniCPM's multipliers; give minicpm convert",
    ),
    "another, by arguments": (TOOL, BACK | {"--preset": "minicpm-nano"}, untouched, "hidden_size is 96 in the arg"),
    "another width": (TOOL, TOLD, another_model(hidden_size=192), "has shape [400, 96], the model says [400, 192]"),
    "another depth": (TOOL, TOLD, another_model(num_layers=3), "has shape [2, 96], the model says [3, 96]"),
    "a tensor missing": (
        TOOL,
        BACK,
        edited(without(FC1)),
        "tensor decoder.layers.0.mlp.linear_fc1.weight and 1 more m",
    ),
    "experts": (TOOL, TOLD, another_model(**EXPERTS), "tensor decoder.layers.0.mlp.router.weight and 17 more missing"),
    "untied": (
        TOOL,
        TOLD,
        another_model(untie_embeddings_and_output_weights=True),
        "tensor output_layer.weight missing",
    ),
    "more words": (TOOL, TOLD, another_model(vocab_size=401), "has shape [400, 96], the model says [401, 96]"),
    "fewer words": (TOOL, TOLD, another_model(vocab_size=272), "400 rows, too many for a vocabulary of 272 padded to"),
    "unknown preset": (TOOL, BACK | {"--preset": "minicpm-3b"}, untouched, "minicpm-3b"),
    "preset and recipe": (TOOL, TOLD | {"--preset": "minicpm-nano"}, untouched, "--recipe: --preset says it already"),
    "no recipe": (TOOL, BACK | {"--recipe": "none.yaml"}, untouched, "none.yaml"),
    "of another format": (
        TOOL,
        TOLD | {"--input": "ours"},
        untouched,
        "in the format megatron contains its model; leave",
    ),
    # the folder
    "tracker of nothing": (
        TOOL,
        BACK,
        write("megatron/latest_checkpointed_iteration.txt", "12"),
        "iter_0000012, which",
    ),
    "tracker": (TOOL, BACK, write("megatron/latest_checkpointed_iteration.txt", "../x"), "neither an iteration nor"),
    "another backend": (
        TOOL,
        BACK,
        write(f"{RELEASE}/metadata.json", '{"sharded_backend": "zarr", "sharded_backend_version": 1}'),
        "a checkpoint of zarr version 1; save it in Megatron-LM with --ckpt-format torch_dist",
    ),
    "no backend": (TOOL, BACK, remove(f"{RELEASE}/metadata.json"), "no metadata.json, so not a whole torch_dist"),
    "older format": (TOOL, BACK | {"--input": "old"}, older_format, "weights only as mp_rank_00/model_optim_rng.pt"),
    "checksums": (TOOL, BACK, checksums, ".metadata: the checksum is not that of what was saved"),
    # the table of contents
    "no contents": (TOOL, BACK, remove(METADATA), f"{METADATA}: cannot be read"),
    "empty contents": (TOOL, BACK, write(METADATA, b""), f"{METADATA}: not a whole pickle"),
    "contents cut short": (TOOL, BACK, cut(METADATA), f"{METADATA}: not a whole pickle"),
    "contents are garbage": (TOOL, BACK, write(METADATA, bytes(range(256)) * 9), f"{METADATA}: "),
    "contents of another kind": (TOOL, BACK, write(METADATA, pickle.dumps([1, 2])), "not the table of contents"),
    "contents that explode": (TOOL, BACK, write(METADATA, pickle.dumps({"a": [Bomb()]})), BOMB),
    "contents that explode below": (TOOL, BACK, edited(lambda m: setattr(m, "planner_data", Bomb())), BOMB),
    "another folder's file": (TOOL, BACK, edited(elsewhere), "names '../release/__0_0.distcp', which is not a file of"),
    "chunks overlap": (TOOL, BACK, edited(overlap), f"{FC1} is not stored whole: its chunks overlap or leave a gap"),
    "a gap": (TOOL, BACK, edited(lambda m: chunks(m).pop()), f"{FC1} is not stored whole: its chunks overlap or"),
    "a tensor too many": (TOOL, BACK, edited(a_bias), "unexpected tensor decoder.layers.mlp.linear_fc1.bias"),
    "quantised": (TOOL, BACK, edited(stored_as), f"tensor {EMBEDDING} is stored as torch.int8"),
    # the data
    "no data": (TOOL, BACK, remove(DATA), f"{DATA}: missing; restore it or use another checkpoint"),
    "data cut short": (TOOL, TOLD, lambda folder: (forget_the_model(folder), cut(DATA)(folder)), "cut short: "),
    "a damaged chunk": (TOOL, BACK, damage_a_chunk, f"{EMBEDDING} is damaged: "),
    "a chunk of another type": (TOOL, BACK, edited(lie_about_a_shape), f"a chunk of {EMBEDDING} is (torch.float32, "),
    "a chunk that explodes": (TOOL, BACK, lambda f: point_to(f, EMBEDDING, saved([Bomb()])), f"{EMBEDDING} is damaged"),
    "a chunk that is none": (
        TOOL,
        BACK,
        lambda f: point_to(f, EMBEDDING, saved([1])),
        f"a chunk of {EMBEDDING} is list",
    ),
    # the state beside the tensors
    "state that explodes": (TOOL, BACK, lambda folder: point_to(folder, COMMON, saved([{"args": Bomb()}])), BOMB),
    "damaged state": (TOOL, BACK, lambda folder: point_to(folder, COMMON, b"x" * 99), "not a whole file of torch.save"),
    "a file of state that explodes": (TOOL, BACK, write(f"{RELEASE}/common.pt", saved({"args": Bomb()})), BOMB),
    "a damaged file of state": (TOOL, BACK, write(f"{RELEASE}/common.pt", b"PK"), "common.pt: not a whole file of"),
    # what is asked for
    "a tokenizer": (
        TOOL,
        {"--input": "ours", "--to": "torch_dist", "--output": "out", "--tokenizer": "ours"},
        untouched,
        "--tokenizer: torch_dist has no place for a tokenizer",
    ),
    "output in the way": (TOOL, BACK, move_ours, "out: the output folder is not empty"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_the_disk_as_it_was(name: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    check_mistake(CASES[name], here, capfd)
    assert not (here / "made").exists()


def test_state_that_makes_no_sense_is_left_out(here: Path) -> None:
    for iteration in (10**400, -1, 0.5, "seven", None, [7]):
        point_to(here, COMMON, saved([{"iteration": iteration, "args": 3, "optimizer": {"state": 1}}]))
        assert open_source(here / "megatron", MODEL).origin["iteration"] is None


def test_the_bomb_is_one(here: Path) -> None:
    pickle.loads(pickle.dumps(Bomb()))
    assert (here / "made").exists()
