"""End tokens and settings for generation go with a model through every format, and lists stay lists."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from minicpm_megatron.convert import convert, open_source
from minicpm_megatron.convert.generation import Generator
from minicpm_megatron.convert.text_settings import SpecialTokens
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.manifest import read_manifest
from tests.convert.conftest import MakeCheckpoint

SETTINGS = {"do_sample": False, "repetition_penalty": 1.1, "bos_token_id": 5, "eos_token_id": [6, 7], "top_k": 20}


def somebody_elses(
    checkpoint: MakeCheckpoint,
    folder: Path,
    tokenizer: Path | None,
    *,
    target: str = "llama",
    generation: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A published folder with other tokens than MiniCPM's."""
    convert(checkpoint(f"{folder.name}-ours"), folder, target, dtype="fp32", tokenizer=tokenizer)
    content = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


def tokens_of(content: dict[str, Any]) -> tuple[Any, Any]:
    return content["bos_token_id"], content["eos_token_id"]


@pytest.fixture
def fast_only(tokenizer: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "fast"
    folder.mkdir()
    shutil.copy(tokenizer / "tokenizer.json", folder)
    return folder


@pytest.mark.parametrize("through", ["megatron", "torch_dist"])
def test_a_folder_with_tokenizer_json_alone(
    through: str, checkpoint: MakeCheckpoint, fast_only: Path, tmp_path: Path
) -> None:
    there = somebody_elses(
        checkpoint, tmp_path / "llama", fast_only, generation=SETTINGS, bos_token_id=5, eos_token_id=[6, 7]
    )
    convert(there, tmp_path / "kept", through)
    convert(tmp_path / "kept", tmp_path / "granite", "granite", tokenizer=there if through == "torch_dist" else None)
    assert tokens_of(read(tmp_path / "granite", "config")) == (5, [6, 7])
    assert read(tmp_path / "granite", "generation_config") == SETTINGS


def test_a_list_stays_a_list_beside_a_tokenizer_model(
    checkpoint: MakeCheckpoint, tokenizer: Path, tmp_path: Path
) -> None:
    generation = {"temperature": 0.3, "eos_token_id": [2, 3, 9], "pad_token_id": 0}
    there = somebody_elses(checkpoint, tmp_path / "llama", tokenizer, generation=generation, eos_token_id=[2, 3])
    for target in ("granite", "minicpm"):
        done = convert(there, tmp_path / target, target)
        assert tokens_of(read(tmp_path / target, "config")) == (1, [2, 3])
        assert read(tmp_path / target, "generation_config") == generation
        assert not done.notes
    # one end token in a list is not the same text as one that is none
    there = somebody_elses(checkpoint, tmp_path / "again", tokenizer, eos_token_id=[2])
    convert(there, tmp_path / "kept", "megatron")
    convert(tmp_path / "kept", tmp_path / "out", "llama")
    assert tokens_of(read(tmp_path / "out", "config")) == (1, [2])
    # and where there were no settings, none are invented
    assert read(tmp_path / "out", "generation_config") == {"bos_token_id": 1, "eos_token_id": [2]}


def test_transformers_reads_the_same_settings_before_and_after(
    checkpoint: MakeCheckpoint, tokenizer: Path, tmp_path: Path
) -> None:
    from transformers import GenerationConfig

    there = somebody_elses(checkpoint, tmp_path / "llama", tokenizer, generation=SETTINGS, bos_token_id=5)
    convert(there, tmp_path / "kept", "megatron")
    convert(tmp_path / "kept", tmp_path / "out", "granite")
    before, after = (GenerationConfig.from_pretrained(folder) for folder in (there, tmp_path / "out"))
    assert before.to_dict() == after.to_dict() and after.eos_token_id == [6, 7]


def test_generation_settings_alone_say_the_tokens(checkpoint: MakeCheckpoint, fast_only: Path, tmp_path: Path) -> None:
    there = somebody_elses(checkpoint, tmp_path / "llama", fast_only, generation=SETTINGS)
    content = {key: value for key, value in read(there, "config").items() if not key.endswith("os_token_id")}
    (there / "config.json").write_text(json.dumps(content))
    assert open_source(there).text.tokens == SpecialTokens(5, (6, 7))


def test_another_tokenizer_brings_its_own_tokens(
    checkpoint: MakeCheckpoint, tokenizer: Path, fast_only: Path, tmp_path: Path
) -> None:
    there = somebody_elses(
        checkpoint, tmp_path / "llama", fast_only, generation=SETTINGS, bos_token_id=5, eos_token_id=[6, 7]
    )
    done = convert(there, tmp_path / "out", "granite", tokenizer=tokenizer)
    assert tokens_of(read(tmp_path / "out", "config")) == (1, 2)
    assert read(tmp_path / "out", "generation_config") == SETTINGS | {"bos_token_id": 1, "eos_token_id": 2}
    [note] = done.notes
    assert note == (
        "a text begins with 1 and ends with 2, as the tokenizer says; the model's configuration says 5 and 6 or 7"
    )
    convert(there, tmp_path / "kept", "megatron", tokenizer=tokenizer)
    convert(tmp_path / "kept", tmp_path / "later", "granite")
    assert read(tmp_path / "later", "generation_config") == SETTINGS | {"bos_token_id": 1, "eos_token_id": 2}


def test_the_configuration_is_right_against_the_tokenizer_beside_it(
    checkpoint: MakeCheckpoint, tokenizer: Path, tmp_path: Path
) -> None:
    there = somebody_elses(checkpoint, tmp_path / "llama", tokenizer, bos_token_id=5, eos_token_id=6)
    done = convert(there, tmp_path / "out", "granite")
    assert tokens_of(read(tmp_path / "out", "config")) == (5, 6)
    assert done.notes == (
        "a text begins with 5 and ends with 6, as the model's configuration says; the tokenizer says 1 and 2",
    )


def test_the_names_in_tokenizer_config_are_enough(checkpoint: MakeCheckpoint, fast_only: Path, tmp_path: Path) -> None:
    (fast_only / "tokenizer_config.json").write_text('{"bos_token": "<unk>", "eos_token": {"content": "<s>"}}')
    convert(checkpoint(), tmp_path / "out", "llama", tokenizer=fast_only)
    assert tokens_of(read(tmp_path / "out", "config")) == (0, 1)


def test_a_text_ends_at_any_of_its_end_tokens(checkpoint: MakeCheckpoint, tokenizer: Path, tmp_path: Path) -> None:
    whole = Generator(checkpoint("plain"), tokenizer, dtype=torch.float32).greedy([1, 20, 30], 8)
    there = somebody_elses(checkpoint, tmp_path / "llama", tokenizer, eos_token_id=[2, whole[3]])
    found = Generator(there, dtype=torch.float32).greedy([1, 20, 30], 8)
    assert found == whole[: whole.index(whole[3])]
    # the settings for generation go before, as in transformers
    there = somebody_elses(checkpoint, tmp_path / "other", tokenizer, generation={"eos_token_id": [whole[5], 399]})
    found = Generator(there, dtype=torch.float32).greedy([1, 20, 30], 8)
    assert found == whole[: whole.index(whole[5])]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"eos_token_id": "</s>"}, "eos_token_id '</s>' is no id of a vocabulary of 400"),
        ({"eos_token_id": [2, None]}, "eos_token_id None is no id"),
        ({"eos_token_id": 400}, "eos_token_id 400 is no id"),
        ({"bos_token_id": [1]}, r"bos_token_id \[1\] is no id"),
        ({"bos_token_id": -1}, "bos_token_id -1 is no id"),
        ({"eos_token_id": [[2]]}, r"eos_token_id \[2\] is no id"),
        ({"bos_token_id": True}, "bos_token_id True is no id"),
        ({"bos_token_id": {"id": 1}}, "bos_token_id .* is no id"),
        ({"pad_token_id": 0.5}, "pad_token_id 0.5 is no id"),
    ],
    ids=str,
)
def test_tokens_that_are_none(config: dict[str, Any], message: str, checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"config.json: {message}"):
        open_source(somebody_elses(checkpoint, tmp_path / "llama", None, **config))
    there = somebody_elses(checkpoint, tmp_path / "other", None, generation=config)
    with pytest.raises(UserError, match=f"generation_config.json: {message}"):
        open_source(there)


def test_a_checkpoint_keeps_them_in_its_state(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    there = somebody_elses(checkpoint, tmp_path / "llama", None, generation=SETTINGS, bos_token_id=None, eos_token_id=3)
    convert(there, tmp_path / "kept", "megatron")
    assert read_manifest(tmp_path / "kept")["state"]["text"] == {
        "bos_token_id": None,
        "eos_token_id": 3,
        "generation_config": SETTINGS,
    }
