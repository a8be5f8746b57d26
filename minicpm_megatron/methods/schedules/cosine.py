"""Cosine of appendix B.1 (arXiv 2404.06395)."""

from __future__ import annotations

from dataclasses import dataclass

from minicpm_megatron.methods.schedules.cosine_loop import CosineLoop
from minicpm_megatron.registry import SCHEDULES


@SCHEDULES.register("cosine")
@dataclass(frozen=True, kw_only=True)
class Cosine(CosineLoop):
    """Cosine(T), appendix B.1: as CosineLoop until T, then 0.1 of the rate."""

    def after_warmup(self, position: float) -> float:
        return super().after_warmup(min(position, self.period))
