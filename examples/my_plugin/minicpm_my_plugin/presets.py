"""A preset is a function without arguments that returns a ModelRecipe."""

from __future__ import annotations

from minicpm_megatron.recipe import ModelRecipe


def wide_tiny() -> ModelRecipe:
    """Twice as wide and half as deep as minicpm-tiny."""
    return ModelRecipe(
        num_layers=2,
        hidden_size=512,
        ffn_hidden_size=1280,
        num_attention_heads=8,
        vocab_size=8192,
        max_position_embeddings=512,
    )
