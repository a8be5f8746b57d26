"""Each way in which other exporters' folders go wrong in some program, and the tokenizer that goes with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors import safe_open

from minicpm_megatron.convert import convert
from minicpm_megatron.convert.tokenizer_folder import CONTROL_PROBES, PROBES
from minicpm_megatron.errors import UserError
from tests.convert.conftest import (
    CASES,
    EXPERTS,
    VOCABULARY,
    MakeCheckpoint,
    canonical_logits,
    named,
    random_tensors,
    small_model,
)

EVERY_FORMAT = pytest.mark.parametrize(**named(CASES))


def exported(
    checkpoint: MakeCheckpoint, tmp_path: Path, target: str, tokenizer: Path | None = None, **model: Any
) -> Path:
    convert(checkpoint(**model), tmp_path / "out", target, tokenizer=tokenizer)
    return tmp_path / "out"


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@EVERY_FORMAT
def test_trap_1_rope_is_written_for_old_and_new_readers(
    target: str, kind: dict[str, Any], checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = exported(checkpoint, tmp_path, target, rotary_base=5e5, **kind)
    config = config_of(folder)
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] is None and "rope_scaling" in config
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e5}
    if target != "minicpm":
        from transformers import AutoConfig

        assert AutoConfig.from_pretrained(folder).rope_parameters["rope_theta"] == 5e5


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@EVERY_FORMAT
def test_trap_2_the_tie_is_explicit_and_true_only_without_a_head(
    target: str, kind: dict[str, Any], untied: bool, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = exported(checkpoint, tmp_path, target, untie_embeddings_and_output_weights=untied, **kind)
    tied = config_of(folder)["tie_word_embeddings"]
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        assert ("lm_head.weight" in weights.keys()) is not tied  # noqa: SIM118
    assert tied is (target in ("granite", "granitemoe") and not untied)


def test_trap_2_a_tied_minicpm_has_its_embedding_as_head(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = exported(checkpoint, tmp_path, "minicpm")
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        head, embedding = (weights.get_tensor(f"{name}.weight") for name in ("lm_head", "model.embed_tokens"))
    assert torch.equal(head, embedding)


@EVERY_FORMAT
def test_trap_3_transformers_and_sentencepiece_give_the_same_ids(
    target: str, kind: dict[str, Any], checkpoint: MakeCheckpoint, tmp_path: Path, tokenizer: Path
) -> None:
    from transformers import AutoTokenizer

    folder = exported(checkpoint, tmp_path, target, tokenizer, **kind)
    assert (folder / "tokenizer.model").read_bytes() == (tokenizer / "tokenizer.model").read_bytes()
    assert (folder / "tokenizer.json").is_file()
    slow = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    fast = AutoTokenizer.from_pretrained(folder)
    for text in (*PROBES, "微笑着 def hidden(self) -> None:", "▁literal mark", "tail "):
        assert fast.encode(text, add_special_tokens=False) == slow.encode(text), text
    assert (fast.bos_token_id, fast.eos_token_id) == (slow.bos_id(), slow.eos_id())


def test_trap_3_two_tokenizers_that_disagree_are_refused(
    checkpoint: MakeCheckpoint, tmp_path: Path, tokenizer: Path
) -> None:
    copy = shutil.copytree(tokenizer, tmp_path / "tokenizer")
    content = json.loads((copy / "tokenizer.json").read_text())
    content["normalizer"]["normalizers"].pop(0)  # the leading word-boundary mark
    (copy / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="different ids"):
        exported(checkpoint, tmp_path, "llama", copy)
    assert not (tmp_path / "out").exists()


def test_trap_3_names_of_tokens_in_a_text(checkpoint: MakeCheckpoint, tmp_path: Path, tokenizer: Path) -> None:
    """Settings of somebody else's are kept, and the switch is said; with it the ids are equal."""
    from transformers import AutoTokenizer

    copy = shutil.copytree(tokenizer, tmp_path / "tokenizer")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    done = convert(checkpoint(), tmp_path / "out", "llama", tokenizer=copy)
    [note] = done.notes
    assert "tokenizer.json reads <unk>, <s>, </s> in a text as tokens" in note and "split_special_tokens=True" in note
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == settings
    slow = sentencepiece.SentencePieceProcessor(model_file=str(copy / "tokenizer.model"))
    text = CONTROL_PROBES[0]
    as_shipped, switched = (
        AutoTokenizer.from_pretrained(tmp_path / "out", **switch) for switch in ({}, {"split_special_tokens": True})
    )
    assert 1 in as_shipped.encode(text, add_special_tokens=False)
    assert switched.encode(text, add_special_tokens=False) == slow.encode(text)
    # as the note says
    (copy / "tokenizer_config.json").write_text(json.dumps(settings | {"split_special_tokens": True}))
    assert not convert(checkpoint("again"), tmp_path / "split", "llama", tokenizer=copy).notes


def test_trap_3_a_name_that_no_setting_makes_a_text(
    checkpoint: MakeCheckpoint, tmp_path: Path, tokenizer: Path
) -> None:
    """As in tokenizers with `ignore_merges`, which look a whole word up, whatever the switch."""
    copy = shutil.copytree(tokenizer, tmp_path / "tokenizer")
    content = json.loads((copy / "tokenizer.json").read_text())
    content["model"]["ignore_merges"] = True
    isolated = {"type": "Split", "pattern": {"Regex": "</?s>"}, "behavior": "Isolated", "invert": False}
    (copy / "tokenizer.json").write_text(json.dumps(content | {"pre_tokenizer": isolated}))
    done = convert(checkpoint(), tmp_path / "out", "llama", tokenizer=copy)
    [note] = done.notes
    assert note.endswith("different ids for 'Price: <s>100 <s>', and no setting changes it")


def test_trap_3_a_lone_tokenizer_model_is_refused(checkpoint: MakeCheckpoint, tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    shutil.copy(tokenizer / "tokenizer.model", tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        exported(checkpoint, tmp_path, "minicpm", tmp_path / "tokenizer")
    # ours reads nothing but tokenizer.model
    convert(checkpoint("other"), tmp_path / "kept", "megatron", tokenizer=tmp_path / "tokenizer")


@pytest.mark.parametrize(("target", "kind"), [("granite", {}), ("granitemoe", EXPERTS)], ids=["granite", "granitemoe"])
def test_attention_multiplier_of_granite_is_not_its_default(
    target: str, kind: dict[str, Any], checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    config = config_of(exported(checkpoint, tmp_path, target, **kind))
    assert config["attention_multiplier"] == pytest.approx(12**-0.5)


def test_trap_4_a_mixture_in_fp64_runs_with_the_eager_experts_of_transformers(
    checkpoint: MakeCheckpoint, tmp_path: Path, tokens: torch.Tensor
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "out"
    convert(checkpoint(**EXPERTS), folder, "granitemoe", dtype="fp32")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    with torch.no_grad():
        theirs = model(tokens[None]).logits[0]
    shape = small_model(**EXPERTS)
    weights = {name: tensor.double() for name, tensor in random_tensors(shape).items()}
    ours = canonical_logits(shape, weights, tokens)
    assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()  # transformers keeps norms and rotations in fp32


@EVERY_FORMAT
def test_no_code_is_named_and_none_is_shipped(
    target: str, kind: dict[str, Any], checkpoint: MakeCheckpoint, tmp_path: Path, tokenizer: Path
) -> None:
    copy = shutil.copytree(tokenizer, tmp_path / "tokenizer")
    (copy / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.T", null]}, "bos_token": "<s>"}')
    folder = exported(checkpoint, tmp_path, target, copy, **kind)
    assert not list(folder.glob("*.py"))
    assert all("auto_map" not in path.read_text() for path in folder.glob("*.json"))
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {"bos_token": "<s>"}


def test_published_fields_of_minicpm(checkpoint: MakeCheckpoint, tmp_path: Path, tokenizer: Path) -> None:
    folder = exported(checkpoint, tmp_path, "minicpm", tokenizer, hidden_size=96, dim_model_base=256)
    config = config_of(folder)
    published = {
        "architectures": ["MiniCPMForCausalLM"],
        "model_type": "minicpm",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.1,
        "rms_norm_eps": 1e-5,
        "scale_emb": 12,
        "dim_model_base": 256,
        "scale_depth": 1.4,
        "torch_dtype": "bfloat16",
        "vocab_size": VOCABULARY,
    }
    assert {key: config.get(key) for key in published} == published
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {
        "do_sample": True,
        "top_p": 0.8,
        "temperature": 0.8,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


@pytest.mark.parametrize(**named([case for case in CASES if case[0] != "minicpm"]))
def test_transformers_generates_from_the_folder(
    target: str, kind: dict[str, Any], checkpoint: MakeCheckpoint, tmp_path: Path, tokenizer: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = exported(checkpoint, tmp_path, target, tokenizer, **kind)
    model = AutoModelForCausalLM.from_pretrained(folder)
    words = AutoTokenizer.from_pretrained(folder)
    assert (model.generation_config.top_p, model.generation_config.temperature) == (0.8, 0.8)
    prompt = words("The quick", return_tensors="pt")
    torch.manual_seed(0)
    output = model.generate(**prompt, min_new_tokens=8, max_new_tokens=8)
    assert output.shape[1] == prompt["input_ids"].shape[1] + 8
    assert isinstance(words.decode(output[0]), str)


def test_a_vocabulary_larger_than_the_tokenizer_is_noted(
    checkpoint: MakeCheckpoint, tmp_path: Path, tokenizer: Path
) -> None:
    done = convert(checkpoint(vocab_size=VOCABULARY + 8), tmp_path / "out", "llama", tokenizer=tokenizer)
    assert done.notes == ("8 rows of the vocabulary have no piece in the tokenizer",)


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(
    checkpoint: MakeCheckpoint, tmp_path: Path, tokenizer: Path
) -> None:
    with pytest.raises(UserError, match=f"{VOCABULARY} pieces, the model's vocabulary {VOCABULARY - 1}"):
        convert(checkpoint(vocab_size=VOCABULARY - 1), tmp_path / "out", "llama", tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_of_a_folder_follows_it_through_our_format(
    checkpoint: MakeCheckpoint, tmp_path: Path, tokenizer: Path
) -> None:
    folder = exported(checkpoint, tmp_path, "granite", tokenizer)
    assert not convert(folder, tmp_path / "imported", "megatron").notes
    assert not convert(tmp_path / "imported", tmp_path / "again", "minicpm").notes
    assert (tmp_path / "again" / "tokenizer.json").is_file()
