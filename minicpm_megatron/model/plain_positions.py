"""Rotary positions of a GPTModel or HybridModel of Megatron-Core's against those of the MiniCPMConfig in it.

Arguments of the model's constructor decide them (position_embedding_type, rotary_base, rotary_percent, rope_scaling,
seq_len_interpolation_factor), and their defaults are not MiniCPM's. No module of a spec is told these arguments, so the
first layer looks at the angles that it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from minicpm_megatron.errors import require
from minicpm_megatron.methods.rope import rope_of
from minicpm_megatron.model.config import MiniCPMConfig

WHERE = "arguments of GPTModel or HybridModel"
# relative, of an angle over the first channel's: fp32 keeps 6e-8, and bases that differ by 1 % differ by far more
TOLERANCE = 1e-4


class PositionWatch:
    """Compares what a model gives to its first layer with the config.

    Args:
        config: one that is no MiniCPMConfig holds no rotary base, and is Megatron-LM's own concern.
    """

    def __init__(self, config: TransformerConfig) -> None:
        self.config = config if isinstance(config, MiniCPMConfig) else None
        self._compared = False

    def check(self, given: Mapping[str, Any]) -> None:
        """Look at the arguments of a layer's forward; at angles once, since reading them waits for the device.

        Raises:
            UserError: there are no rotary positions, or others than the config's.
        """
        if self.config is None or given.get("inference_context") is not None:
            return
        angles = given.get("rotary_pos_emb")
        require(
            isinstance(angles, Tensor),
            WHERE,
            "the model has no rotary positions",
            'give position_embedding_type="rope"',
        )
        assert isinstance(angles, Tensor)
        length = angles.size(0) * self.config.context_parallel_size
        require(
            self.config.rope_scaling.type != "dynamic" or length <= self.config.max_position_embeddings,
            "MiniCPM's layer spec",
            f"{length:,} tokens are beyond max_position_embeddings, where the base must grow",
            "build MiniCPMModel or MiniCPMHybridModel",
        )
        if not self._compared:
            self._compare(self.config, angles)
            self._compared = True

    def _compare(self, config: MiniCPMConfig, angles: Tensor) -> None:
        """Angles are fp32 [s, 1, 1, channels], twice channels / 2 of them, in radians."""
        rope = rope_of(config)
        whole = angles.size(-1) == rope.channels
        require(whole, WHERE, f"{angles.size(-1)} of {rope.channels} channels are rotated", "leave out rotary_percent")
        turns = angles[:, 0, 0, : rope.channels // 2].double().cpu()  # [s, channels / 2]
        first = turns[:, 0]  # the first channel turns by one radian a position
        require(
            bool(torch.isclose(first, first.round(), rtol=0, atol=1e-3).all()),
            WHERE,
            "positions are interpolated",
            "leave out seq_len_interpolation_factor",
        )
        # angle over the first channel's is base^(-2i / channels) at every position but 0, whichever a rank holds
        place = int(first.argmax())
        if first[place] == 0:
            return
        channels = torch.arange(0, rope.channels, 2, dtype=torch.float64) / rope.channels
        expected = rope.base_at(1) ** -channels
        require(
            bool(torch.allclose(turns[place] / first[place], expected, rtol=TOLERANCE, atol=0)),
            WHERE,
            f"the rotary base is not the config's {config.rotary_base:g}",
            f"give rotary_base={config.rotary_base:g}, and no rope_scaling",
        )
