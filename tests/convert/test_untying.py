"""--untie to published formats: the head is a tensor of its own there and here again, and no logit changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minicpm_megatron.convert import convert, open_source
from minicpm_megatron.errors import UserError
from tests.convert.conftest import (
    CASES,
    MakeCheckpoint,
    assert_bit_equal,
    canonical_logits,
    named,
    random_tensors,
    small_model,
)

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


@pytest.mark.parametrize(**named([*CASES, ("megatron", {})]))
def test_an_untied_export_comes_back_untied(
    target: str, kind: dict[str, Any], checkpoint: MakeCheckpoint, tmp_path: Path, tokens: torch.Tensor
) -> None:
    dtype = None if target == "megatron" else "fp32"
    done = convert(checkpoint(**kind), tmp_path / "out", target, dtype=dtype, untie=True)
    model = small_model(**kind)
    assert done.parameters == sum(t.numel() for t in random_tensors(model).values()) + model.vocab_size * 96
    source = open_source(tmp_path / "out")
    assert source.model == model.model_copy(update={"untie_embeddings_and_output_weights": True})
    found = {name: source.tensors.read(name) for name in source.tensors.names()}
    before = random_tensors(model)
    if target not in ("llama", "mixtral"):  # whose folds round
        assert_bit_equal(found, before | {HEAD: before[EMBEDDING]})
    torch.testing.assert_close(found[HEAD], found[EMBEDDING], rtol=1e-6, atol=0)
    expected = canonical_logits(model, before, tokens)
    assert float((canonical_logits(source.model, found, tokens) - expected).abs().max() / expected.abs().max()) < 2e-6


@pytest.mark.parametrize("target", ["granite", "llama", "minicpm"])
def test_a_tied_export_is_untied_again(target: str, checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Folder to folder, where the tie is a flag (granite) or a note beside a written head (llama, minicpm)."""
    convert(checkpoint(), tmp_path / "tied", target, dtype="fp32")
    convert(tmp_path / "tied", tmp_path / "untied", "granite", dtype="fp32", untie=True)
    assert json.loads((tmp_path / "untied" / "config.json").read_text())["tie_word_embeddings"] is False
    source = open_source(tmp_path / "untied")
    assert source.model.untie_embeddings_and_output_weights
    assert torch.equal(source.tensors.read(HEAD), source.tensors.read(EMBEDDING))


def test_what_is_not_tied_cannot_be_untied(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    untied = checkpoint("untied", untie_embeddings_and_output_weights=True)
    tensors = random_tensors(small_model())
    both = checkpoint("both", tensors | {HEAD: tensors[EMBEDDING]})
    for folder, message in (
        (untied, "the head has weights of its own already; leave --untie out"),
        (both, "the model is tied, and tensor output_layer.weight unexpected"),
    ):
        with pytest.raises(UserError, match=message):
            convert(folder, tmp_path / "out", "granite", untie=True)
    assert not (tmp_path / "out").exists()
