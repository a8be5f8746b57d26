"""tools/generate.py: greedy text equals the argmax of the independent forward, from every kind of folder."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from minicpm_megatron.convert import convert, open_source
from minicpm_megatron.convert.generation import Generator
from minicpm_megatron.convert.sampling import Sampling
from minicpm_megatron.errors import UserError
from tests.convert.conftest import CASES, EXPERTS, canonical_logits, named, read_checkpoint
from tests.processes.client import run_script

PROMPT = "the cat"


def argmax_continuation(folder: Path, tokenizer: Path, length: int) -> str:
    """Greedy decoding with the reference forward, one whole sequence at a time."""
    model, tensors = open_source(folder).model, read_checkpoint(folder)
    pieces = AutoTokenizer.from_pretrained(tokenizer)
    tokens = pieces(PROMPT, return_tensors="pt")["input_ids"]
    for _ in range(length):
        following = canonical_logits(model, tensors, tokens[0])[-1].argmax()
        tokens = torch.cat([tokens, following.view(1, 1)], dim=1)
        if int(following) == pieces.eos_token_id:
            break
    return pieces.decode(tokens[0], skip_special_tokens=True)


@pytest.mark.parametrize(**named([("megatron", {}), ("megatron", EXPERTS), *CASES]))
def test_greedy_text_is_the_argmax_of_the_reference(checkpoint, tokenizer, tmp_path, target, kind):
    folder = checkpoint(**kind)
    expected = argmax_continuation(folder, tokenizer, 12)
    if target != "megatron":
        convert(folder, tmp_path / "out", target, dtype="fp32", tokenizer=tokenizer)
        folder = tmp_path / "out"
    found = Generator(folder, tokenizer, dtype=torch.float32).continue_text(
        PROMPT, Sampling(max_new_tokens=12, temperature=0.0)
    )
    assert found == expected


@pytest.mark.cpu_only("nothing of a tokenizer is computed")
def test_the_tokenizer_of_an_exported_folder_is_loaded_in_silence(checkpoint, tokenizer, tmp_path, recwarn):
    """transformers has no class for the model type `minicpm`, which it remarks on in the log and by a warning."""
    convert(checkpoint(), tmp_path / "out", "minicpm", dtype="fp32", tokenizer=tokenizer)
    log, heard = logging.getLogger("transformers"), io.StringIO()
    log.addHandler(handler := logging.StreamHandler(heard))
    try:
        Generator(tmp_path / "out")
    finally:
        log.removeHandler(handler)
    assert heard.getvalue() == "" and [str(each.message) for each in recwarn] == []


def test_half_precision_leaves_the_rotary_frequencies_whole(checkpoint, tokenizer):
    """Rounded to bf16 they would be wrong by 0.4 radians at position 1,000."""
    folder = checkpoint()
    whole, half = (Generator(folder, tokenizer, dtype=dtype).model for dtype in (torch.float32, torch.bfloat16))
    assert half.dtype == torch.bfloat16
    found, expected = (model.model.rotary_emb.inv_freq for model in (half, whole))
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_a_seed_repeats_and_another_one_differs(checkpoint, tokenizer):
    generator = Generator(checkpoint(), tokenizer)
    texts = [
        generator.continue_text(PROMPT, Sampling(max_new_tokens=20, temperature=1.5, top_p=1.0, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_prompt_beyond_the_context_is_refused(checkpoint, tokenizer):
    generator = Generator(checkpoint(max_position_embeddings=8), tokenizer)
    with pytest.raises(UserError, match="do not fit a context of 8"):
        generator.continue_text("a b c d e f g h i j k l", Sampling())


def test_only_a_text_that_the_context_cuts_short_is_reported(checkpoint, tokenizer):
    generator = Generator(checkpoint(max_position_embeddings=16), tokenizer)
    generator.ends = ()
    room = 16 - len(generator.encode(PROMPT))
    said: list[int] = []
    texts = [
        generator.continue_text(PROMPT, Sampling(max_new_tokens=new, temperature=0.0), on_full_context=said.append)
        for new in (room - 1, room, room + 1)
    ]
    assert said == [room] and texts[1] == texts[2]
    generator.ends = (generator.continue_tokens(generator.encode(PROMPT), Sampling(room, 0.0))[-1],)
    generator.continue_text(PROMPT, Sampling(room + 1, 0.0), on_full_context=said.append)
    assert said == [room], "an end token in the last place ends the text"


@pytest.mark.cpu_only("refused before there is a model")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere"], "nowhere: no such folder"),
        (["--checkpoint", "."], "not a model"),
        (["--checkpoint", ".", "--temperature", "-1"], "temperature"),
        (["--checkpoint", ".", "--max-new-tokens", "0"], "at least 1"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    done = run_script("tools/generate.py", "--prompt", "x", *arguments)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
