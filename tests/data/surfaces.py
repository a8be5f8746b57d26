"""Bytes of text behind each token, as sentencepiece itself aligns pieces with the text."""

from __future__ import annotations

from collections.abc import Iterable

from minicpm_megatron.data.tokenizers.sentencepiece import SentencePieceTokenizer


def surface_bytes(tokenizer: SentencePieceTokenizer, texts: Iterable[str]) -> list[int]:
    """Of every token of the documents <s> text </s>, one after another."""
    found: list[int] = []
    for text in texts:
        pieces = tokenizer.processor.encode(text, return_type="proto").pieces
        # sentencepiece aligns a character of several byte pieces with the last of them
        inner = [1 if tokenizer.processor.is_byte(p.id) else len(p.surface.encode()) for p in pieces]
        assert sum(inner) == len(text.encode())
        found += [0, *inner, 0]
    return found
