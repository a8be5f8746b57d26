"""Fixtures of the conversions, for models on a GPU."""

from tests.convert.conftest import checkpoint, tokenizer

__all__ = ["checkpoint", "tokenizer"]
