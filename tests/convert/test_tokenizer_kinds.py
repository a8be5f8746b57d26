"""A tokenizer of any kind goes along: into exports, through our checkpoints, and into prompts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from minicpm_megatron.checkpoint.run_state import RunState
from minicpm_megatron.convert import convert, open_source
from minicpm_megatron.convert.generation import Generator
from minicpm_megatron.convert.prompts import open_prompts
from minicpm_megatron.convert.recorded_tokenizer import recorded_tokenizer
from minicpm_megatron.data.tokenizers import load_tokenizer, tokenizer_sha256
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.manifest import TOKENIZER_SHA256
from tests.convert.conftest import MakeCheckpoint
from tests.data.json_tokenizers import SPECIAL, build

STYLES = ("llama-3", "qwen-2", "minicpm")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a lone tokenizer.json in each style."""
    here, sample = tmp_path_factory.mktemp("styles"), [Path(__file__).read_text(encoding="utf-8"), "你好，世界！"]
    return {style: build(style, sample, here / style, vocab_size=400) for style in STYLES}


@pytest.mark.parametrize("style", STYLES)
def test_prompts_are_read_as_by_transformers(style: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Names of special tokens are tokens there, as a chat template wants it, unless the settings say otherwise."""
    folder = shutil.copytree(folders[style], tmp_path / style)
    texts = ("a prompt", "", "  你好\n", f"{SPECIAL[style][-1]}user\nhi{SPECIAL[style][-1]}")
    for split in ({}, {"split_special_tokens": True}):
        settings = folder / "tokenizer_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | split))
        prompts, theirs = open_prompts(folder), AutoTokenizer.from_pretrained(folder)
        for text in texts:
            ids = theirs(text)["input_ids"]
            assert prompts.encode(text) == ids
            assert prompts.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert (prompts.pieces, prompts.named.bos, prompts.named.eos) == (
            len(theirs),
            theirs.bos_token_id,
            theirs.eos_token_id,
        )


def test_prompts_have_the_ids_of_training_whatever_class_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["minicpm"], tmp_path / "minicpm")
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "LlamaTokenizer"}))
    tokenizer = load_tokenizer(folder)
    assert open_prompts(folder).encode(" a") == [tokenizer.bos_id, *tokenizer.encode(" a")]
    settings.unlink()
    assert open_prompts(folder).encode("a")[1:] == tokenizer.encode("a")


@pytest.mark.parametrize("style", STYLES)
def test_a_lone_tokenizer_json_goes_along(
    style: str, folders: dict[str, Path], checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(folders[style])
    ours = checkpoint(vocab_size=tokenizer.vocab_size)
    done = convert(ours, tmp_path / "out", "granite", tokenizer=folders[style])
    assert done.notes == ("no tokenizer.model: llama.cpp's MiniCPM converter needs it",)
    assert tokenizer_sha256(tmp_path / "out") == tokenizer.sha256
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (
        None if tokenizer.bos_id < 0 else tokenizer.bos_id,
        tokenizer.eos_id,
    )
    convert(tmp_path / "out", tmp_path / "back", "megatron")
    assert open_source(tmp_path / "back").tokenizer == (tmp_path / "out").resolve()
    generator = Generator(tmp_path / "back")
    assert generator.decode(generator.encode("a prompt")) == "a prompt"


def test_the_recorded_tokenizer_is_known_by_its_file(folders: dict[str, Path], tmp_path: Path) -> None:
    folder, other = folders["llama-3"], folders["qwen-2"]
    due = {TOKENIZER_SHA256: tokenizer_sha256(folder)}
    for named in (folder, folder / "tokenizer.json"):
        assert recorded_tokenizer(due, RunState(0, tokenizer=str(named)), tmp_path) == (folder, ())
    found, notes = recorded_tokenizer(due, RunState(0, tokenizer=str(other)), tmp_path)
    assert found is None and "has another tokenizer" in notes[0]


@pytest.mark.parametrize("name", ["", "tokenizer.json", "tokenizer.model", "mine.model"])
def test_what_is_not_there_is_one_line(tmp_path: Path, name: str) -> None:
    for ask in (tokenizer_sha256, load_tokenizer):
        with pytest.raises(UserError, match="no such tokenizer"):
            ask(tmp_path / "nowhere" / name)


def test_a_folder_without_any_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json; give --tokenizer DIR"):
        open_prompts(tmp_path)
