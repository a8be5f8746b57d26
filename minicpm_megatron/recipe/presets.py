"""Every model size by name. Adding one is one row here, or one entry point in another package.

Rows hold sizes only: what all MiniCPM models share (scale_emb, scale_depth, dim_model_base, init_method_std,
RoPE base, norm epsilon) is the default of `ModelRecipe`. Sources are sections and tables of arXiv 2404.06395.

A plugin declares an entry point in the group `minicpm_megatron.presets` whose object is a `ModelRecipe` or a
function without arguments that returns one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minicpm_megatron import registry
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe.schema import ModelRecipe, RopeScaling

HEAD = 64  # d_head of every published size (Table 2, Table 8)
VOCABULARY = 122_753  # section 6.1, the tokenizer of 2.4B and of its descendants
VOCABULARY_128K = 122_760  # the released configuration of the 128K model
VOCABULARY_SMALL = 73_440  # section 6.1, the tokenizer of 1.2B


def as_model(entry: Any) -> ModelRecipe:
    """The model of a preset: a ModelRecipe, or a function without arguments that returns one.

    Raises:
        TypeError: it is neither.
    """
    model = entry() if callable(entry) else entry
    if not isinstance(model, ModelRecipe):
        raise TypeError(f"a preset must be a ModelRecipe, not {type(model).__name__}")
    return model


PRESETS: Mapping[str, ModelRecipe] = registry.Entries(registry.PRESETS)
add_preset = registry.PRESETS.add


def get_preset(name: str) -> ModelRecipe:
    """The model called `name`.

    Raises:
        UserError: nobody declares the name (the line names the nearest one), or the plugin that does is broken.
    """
    try:
        model: ModelRecipe = registry.PRESETS.get(name)
    except UserError as error:
        raise UserError(error.what, where=error.where or "preset", fix=error.fix) from error
    return model


def _row(hidden: int, heads: int, layers: int, *, groups: int | None = None, **other: Any) -> ModelRecipe:
    """A size by the family's rule d_ff = 2.5 d_model; every head has its own key and value unless `groups` is given."""
    fields: dict[str, Any] = {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": hidden * 5 // 2,
        "num_attention_heads": heads,
        "num_query_groups": groups or heads,
        "kv_channels": HEAD,
        "vocab_size": VOCABULARY,
    }
    return ModelRecipe(**(fields | other))


# Table 2: d_model, n_q, layers
add_preset("minicpm-1.2b", _row(1536, 24, 52, groups=8, vocab_size=VOCABULARY_SMALL))
add_preset("minicpm-2.4b", _row(2304, 36, 40))
# Section 7.2: head untied. Positions, base and scaling are the released configuration's; dynamic scaling acts beyond
# the 65,536 positions only.
add_preset(
    "minicpm-2.4b-128k",
    _row(
        2304,
        36,
        40,
        untie_embeddings_and_output_weights=True,
        max_position_embeddings=65_536,
        rotary_base=1_000_000.0,
        rope_scaling=RopeScaling(type="dynamic", factor=4.0),
    ),
)
# The same with the seven tokens (chat, fill in the middle, tools) that the released tokenizer adds.
add_preset(
    "minicpm-2.4b-128k-released",
    get_preset("minicpm-2.4b-128k").model_copy(update={"vocab_size": VOCABULARY_128K}),
)
# Section 7.3: 8 experts, 2 a token
add_preset("minicpm-moe-8x2b", _row(2304, 36, 40, num_moe_experts=8, moe_router_topk=2))

# Table 8 (appendix A.1): d_model, heads, layers. The vocabulary is not given there: that of 2.4B.
add_preset("windtunnel-9m", _row(320, 5, 8))
add_preset("windtunnel-30m", _row(512, 8, 12))
add_preset("windtunnel-70m", _row(640, 10, 14))
add_preset("windtunnel-0.1b", _row(768, 12, 16))
add_preset("windtunnel-0.17b", _row(896, 14, 18))
add_preset("windtunnel-0.2b", _row(1024, 16, 20))
add_preset("windtunnel-0.5b", _row(1344, 21, 24))
# Used in figures 3 and 10 without published shapes: these follow the same rule and are nobody's numbers but ours.
add_preset("interpolated-0.3b", _row(1152, 18, 20))
add_preset("interpolated-0.85b", _row(1600, 25, 29))

# Sizes that a CPU trains: the family's proportions, none of them published.
add_preset("minicpm-tiny", _row(256, 4, 4, vocab_size=8192, max_position_embeddings=512))
add_preset("minicpm-micro", _row(128, 2, 3, vocab_size=2048, max_position_embeddings=512))
add_preset("minicpm-nano", _row(64, 4, 2, groups=2, kv_channels=16, vocab_size=512, max_position_embeddings=256))
