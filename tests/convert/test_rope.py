"""Scaled RoPE out and back: what each program reads, and what comes back from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from minicpm_megatron.convert import convert, open_source
from minicpm_megatron.convert.generation import Generator
from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.rope import ntk_base, product_base
from minicpm_megatron.recipe import ModelRecipe
from tests.convert.conftest import CASES, MakeCheckpoint, named, random_tensors, small_model
from tests.device import put

CHANNELS = 12
SCALINGS: dict[str, dict[str, Any]] = {
    "dynamic": {"rotary_base": 1e6, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "ntk": {"rope_scaling": {"type": "ntk", "factor": 4.0, "original_max_position_embeddings": 32}},
    "product": {"rotary_base": 1e6, "rope_scaling": {"type": "product", "factor": 4.0}},
}
EVERY_SCALING = pytest.mark.parametrize("scaling", SCALINGS)
EVERY_FORMAT = pytest.mark.parametrize(**named(CASES))


def exported(checkpoint: MakeCheckpoint, tmp_path: Path, target: str, **model: Any) -> tuple[Path, dict[str, Any]]:
    convert(checkpoint(**model), tmp_path / "out", target, dtype="fp32")
    return tmp_path / "out", json.loads((tmp_path / "out" / "config.json").read_text())


@EVERY_FORMAT
def test_dynamic_is_written_as_the_released_configuration_has_it(
    target: str, kind: dict[str, Any], checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder, config = exported(checkpoint, tmp_path, target, **SCALINGS["dynamic"], **kind)
    assert (config["rope_theta"], config["max_position_embeddings"]) == (1e6, 128)
    # transformers before 4.43 refuses any other number of members than these two
    assert config["rope_scaling"] == {"type": "dynamic", "factor": 4.0}
    assert config["rope_parameters"] == {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 4.0}
    if target != "minicpm":
        read = AutoConfig.from_pretrained(folder).rope_parameters
        assert (read["rope_type"], read["rope_theta"], read["factor"]) == ("dynamic", 1e6, 4.0)


@EVERY_FORMAT
@pytest.mark.parametrize(
    ("scaling", "base"), [("ntk", ntk_base(1e4, 4.0, 12)), ("product", product_base(1e6, 4.0, 12))]
)
def test_ntk_and_product_are_written_as_a_base(
    scaling: str, base: float, target: str, kind: dict[str, Any], checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    _, config = exported(checkpoint, tmp_path, target, **SCALINGS[scaling], **kind)
    assert config["rope_theta"] == base and config["rope_scaling"] is None
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": base}


@EVERY_FORMAT
@EVERY_SCALING
def test_every_scaling_comes_back(
    scaling: str, target: str, kind: dict[str, Any], checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    changes = SCALINGS[scaling] | kind
    folder, _ = exported(checkpoint, tmp_path, target, **changes)
    assert open_source(folder).model == small_model(**changes)


@pytest.mark.parametrize(
    "keys", [("rope_parameters",), ("rope_theta", "rope_scaling")], ids=["transformers 5", "older"]
)
@EVERY_FORMAT
def test_either_generation_of_keys_is_enough(
    target: str, kind: dict[str, Any], keys: tuple[str, ...], checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    changes = SCALINGS["dynamic"] | kind
    folder, config = exported(checkpoint, tmp_path, target, **changes)
    for key in {"rope_parameters", "rope_theta", "rope_scaling"} - set(keys):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    assert open_source(folder).model == small_model(**changes)
    if target != "minicpm":
        read = AutoConfig.from_pretrained(folder).rope_parameters
        assert (read["rope_type"], read["rope_theta"], read["factor"]) == ("dynamic", 1e6, 4.0)


def test_a_folder_that_transformers_saved_again_comes_back(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder, _ = exported(checkpoint, tmp_path, "granite", **SCALINGS["dynamic"])
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert open_source(tmp_path / "again").model == small_model(**SCALINGS["dynamic"])


@pytest.mark.parametrize(
    "edited", [{"rope_theta": 5e5, "rope_parameters": None}, {"max_position_embeddings": 1000}], ids=lambda e: min(e)
)
def test_a_base_edited_by_hand_is_right_against_the_note(
    edited: dict[str, Any], checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder, config = exported(checkpoint, tmp_path, "llama", **SCALINGS["ntk"])
    (folder / "config.json").write_text(json.dumps(config | edited))
    model = open_source(folder).model
    assert model.rope_scaling.type == "none"
    assert model.rotary_base == edited.get("rope_theta", config["rope_theta"])
    assert model.scale_depth == 1.4  # the rest of the note still holds


def test_a_checkpoint_from_before_scaling_existed_is_unscaled(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    from minicpm_megatron.storage.sharded import write_single

    fields = small_model().model_dump(mode="json")
    del fields["rope_scaling"]
    write_single(tmp_path / "old", random_tensors(small_model()).items(), fields, {"step": 0, "tokens": 0})
    assert open_source(tmp_path / "old").model == small_model()
    assert ModelRecipe.model_validate(fields).rope_scaling.type == "none"


def test_generation_beyond_the_context_is_that_of_whole_sequences(
    checkpoint: MakeCheckpoint, tokenizer: Path, tmp_path: Path
) -> None:
    """Each step against a fresh stock model that is given the whole sequence; and in any order."""
    from transformers import AutoModelForCausalLM

    changes = {"max_position_embeddings": 16, "rope_scaling": {"type": "dynamic", "factor": 4.0}}
    folder, _ = exported(checkpoint, tmp_path, "granite", **changes)
    generator = Generator(checkpoint("again", **changes), tokenizer, dtype=torch.float32)
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 400, (length,), generator=draw).tolist() for length in (40, 20, 12)]
    for prompt in prompts:  # the longest first: transformers would go on with its base
        expected = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                stock = put(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
                expected.append(int(stock(put(torch.tensor([expected])), use_cache=False).logits[0, -1].argmax()))
        following = expected[len(prompt) :]
        assert 2 not in following  # </s> would end it
        assert generator.greedy(prompt, 6) == following
        # a whole sequence at once turns by the base of its own length
        with torch.no_grad():
            stock = put(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
            whole = stock(put(torch.tensor([expected])), use_cache=False).logits[0, -3:].cpu()
        torch.testing.assert_close(generator.logits(expected, last=3), whole)


@pytest.mark.parametrize("target", ["llama", "granite"])
def test_a_fixed_base_is_the_dynamic_one_of_that_length(
    target: str, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Stock transformers on 300 tokens: with the one base, and with that which it computes of the length itself."""
    from transformers import AutoModelForCausalLM

    ours = checkpoint(**SCALINGS["dynamic"])
    dynamic = convert(ours, tmp_path / "dynamic", target, dtype="fp32")
    fixed = convert(ours, tmp_path / "fixed", target, dtype="fp32", rope_fixed=300)
    tokens = torch.randint(400, (1, 300), generator=torch.Generator().manual_seed(2))
    logits = {}
    for name in ("dynamic", "fixed"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        with torch.no_grad():
            logits[name] = model(tokens).logits[0]
            logits[name, "short"] = model(tokens[:, :40]).logits[0]
    scale = logits["dynamic"].abs().max()
    assert (logits["fixed"] - logits["dynamic"]).abs().max() < 2e-6 * scale
    assert (logits["fixed", "short"] - logits["dynamic", "short"]).abs().max() > 1e-3 * scale
    config = json.loads((tmp_path / "fixed" / "config.json").read_text())
    assert config["rope_scaling"] is None and config["max_position_embeddings"] == 300
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": config["rope_theta"]}
    # what another program makes of the first is said, and of the second there is nothing to say
    assert any("CTranslate2 refuses it, and llama.cpp stops at 128 tokens" in note for note in dynamic.notes)
    assert any("--rope-fixed LENGTH, up to 512" in note for note in dynamic.notes)
    assert not any("RoPE" in note for note in fixed.notes)
    back = open_source(tmp_path / "fixed").model
    assert (back.rope_scaling.type, back.rotary_base, back.longest_sequence) == ("none", config["rope_theta"], 300)


@pytest.mark.parametrize(
    ("length", "model", "target", "message"),
    [
        (127, SCALINGS["dynamic"], "llama", "127 tokens are outside of the 128 to 512"),
        (513, SCALINGS["dynamic"], "llama", "513 tokens are outside of the 128 to 512"),
        (300, {}, "llama", "has one base already; leave it out"),
        (300, SCALINGS["ntk"], "granite", "has one base already; leave it out"),
        (300, SCALINGS["dynamic"], "megatron", "megatron keeps a model's own scaling"),
        (300, SCALINGS["dynamic"], "torch_dist", "torch_dist keeps a model's own scaling"),
    ],
)
def test_where_no_base_can_be_fixed(
    length: int, model: dict[str, Any], target: str, message: str, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"--rope-fixed: .*{message}"):
        convert(checkpoint(**model), tmp_path / "out", target, rope_fixed=length)
    assert not (tmp_path / "out").exists()
