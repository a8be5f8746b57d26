"""Settings of generation; this module loads no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """Settings by which `Generator` chooses the next token.

    Attributes:
        max_new_tokens: tokens after the prompt.
        temperature: 0 takes the likeliest token each time.
        top_p: tokens that make up this probability are drawn from.
        seed: of the draw.
    """

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_p: float = 0.8
    seed: int = 0
