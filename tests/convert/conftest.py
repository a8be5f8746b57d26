"""Small models with random weights, as checkpoints of ours, and a small tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minicpm_megatron.convert.formats import FORMATS
from minicpm_megatron.convert.our_checkpoint import CheckpointReader, write_single
from minicpm_megatron.recipe import ModelRecipe
from tests.convert import reference

VOCABULARY = 400
MakeCheckpoint = Callable[..., Path]
EXPERTS: dict[str, Any] = {"num_moe_experts": 5, "moe_router_topk": 2, "moe_ffn_hidden_size": 72}
# every format with each kind of model it holds
DENSE_CASES: list[tuple[str, dict[str, Any]]] = [(name, {}) for name, layout in FORMATS.items() if layout.rows]
SPARSE_CASES = [(name, EXPERTS) for name, layout in FORMATS.items() if layout.sparse_rows]
CASES = DENSE_CASES + SPARSE_CASES


def named(cases: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Arguments of `pytest.mark.parametrize` that go with a list of cases."""
    return {
        "argnames": ("target", "kind"),
        "argvalues": cases,
        "ids": [f"{name}, {'experts' if kind else 'dense'}" for name, kind in cases],
    }


def small_model(**changes: Any) -> ModelRecipe:
    """Six layers, 8 query heads on 2 key/value heads, multipliers that are no powers of two."""
    fields: dict[str, Any] = {
        "num_layers": 6,
        "hidden_size": 96,
        "ffn_hidden_size": 240,
        "num_attention_heads": 8,
        "num_query_groups": 2,
        "kv_channels": 12,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "dim_model_base": 40,
    }
    return ModelRecipe(**(fields | changes))


def random_tensors(model: ModelRecipe, seed: int = 0) -> dict[str, torch.Tensor]:
    """Canonical fp32 tensors whose names and shapes are spelled out here, not taken from the package's tables."""
    generator = torch.Generator().manual_seed(seed)
    hidden, ffn, vocabulary = model.hidden_size, model.ffn_hidden_size, model.vocab_size
    heads, groups, channels = model.num_attention_heads, model.num_query_groups, model.kv_channels
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (vocabulary, hidden)}
    for n in range(model.num_layers):
        p = f"decoder.layers.{n}."
        shapes |= {
            p + "input_layernorm.weight": (hidden,),
            p + "self_attention.linear_qkv.weight": ((heads + 2 * groups) * channels, hidden),
            p + "self_attention.linear_proj.weight": (hidden, heads * channels),
            p + "pre_mlp_layernorm.weight": (hidden,),
        }
        if model.num_moe_experts is None:
            shapes |= {p + "mlp.linear_fc1.weight": (2 * ffn, hidden), p + "mlp.linear_fc2.weight": (hidden, ffn)}
            continue
        shapes[p + "mlp.router.weight"] = (model.num_moe_experts, hidden)
        width = model.mlp_width
        for e in range(model.num_moe_experts):
            expert = f"{p}mlp.experts.local_experts.{e}."
            shapes |= {expert + "linear_fc1.weight": (2 * width, hidden), expert + "linear_fc2.weight": (hidden, width)}
    shapes["decoder.final_layernorm.weight"] = (hidden,)
    if model.untie_embeddings_and_output_weights:
        shapes["output_layer.weight"] = (vocabulary, hidden)
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        tensors[name] = 1 + 0.1 * values if len(shape) == 1 else values / math.sqrt(shape[-1])
    return tensors


def reference_config(model: ModelRecipe) -> dict[str, Any]:
    """What `reference.logits` wants to know."""
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "rope_theta": model.rotary_base,
        "rms_norm_eps": model.norm_epsilon,
        "scale_emb": model.scale_emb,
        "scale_depth": model.scale_depth,
        "dim_model_base": model.dim_model_base if model.parametrization == "mup" else model.hidden_size,
        "num_experts": model.num_moe_experts,
        "num_experts_per_tok": model.moe_router_topk,
    }


def canonical_logits(model: ModelRecipe, tensors: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """The reference forward over our checkpoint's tensors."""
    config = reference_config(model)
    return reference.logits(reference.canonical(tensors, config), config, tokens)


def read_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """All parameters of a checkpoint of ours."""
    reader = CheckpointReader(folder)
    return {name: reader.read(name) for name in reader.names()}


def assert_bit_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Same names, same bits."""
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(VOCABULARY, (40,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """checkpoint(name="ours", tensors=None, **model fields) -> folder."""

    def make(name: str = "ours", tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
        model = small_model(**changes)
        content = random_tensors(model) if tensors is None else tensors
        folder = tmp_path / name
        write_single(folder, content.items(), model.model_dump(mode="json"), {"step": 0, "tokens": 0})
        return folder

    return make


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece BPE of `VOCABULARY` pieces with byte fallback, and the same thing as tokenizer.json."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    folder = tmp_path_factory.mktemp("tokenizer")
    lines = Path(reference.__file__).read_text().splitlines() + ["你好，世界！微笑着对他说"] * 3
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    slow = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = {slow.id_to_piece(n): n for n in range(slow.get_piece_size())}
    merges = [
        (piece[:cut], piece[cut:])
        for piece, n in ids.items()
        if not (slow.is_byte(n) or slow.is_control(n) or slow.is_unknown(n))
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    fast = Tokenizer(models.BPE(vocab=ids, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    fast.save(str(folder / "tokenizer.json"))
    return folder
