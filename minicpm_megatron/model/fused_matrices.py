"""Which matrices Megatron-Core keeps fused in one weight, as views of the whole weight."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from minicpm_megatron.model.config import MiniCPMConfig


def matrices_in(config: MiniCPMConfig, name: str, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Every matrix of a whole weight with its name.

    linear_qkv has, for each key/value group, the rows of its query heads, then those of its key, then those of its
    value; linear_fc1 has those of gate, then those of up.

    Args:
        name: of the weight in the whole model.
        whole: [rows, columns].

    Returns:
        (name, view [groups, rows of a group, columns]); the first two dimensions are the matrix's rows.
    """
    if name.endswith("linear_qkv.weight"):
        groups, channels = config.num_query_groups, config.kv_channels
        queries = config.num_attention_heads // groups * channels
        parts = {"query": queries, "key": channels, "value": channels}
    elif name.endswith("linear_fc1.weight"):
        groups, parts = 1, dict.fromkeys(("gate", "up"), whole.size(0) // 2)
    else:
        yield name, whole.unsqueeze(0)
        return
    views = whole.view(groups, -1, whole.size(1)).split(list(parts.values()), dim=1)
    yield from ((f"{name}:{part}", view) for part, view in zip(parts, views, strict=True))
