"""ZeRO 1 and 2: the parameters of a group in one flat tensor, of which every data-parallel rank updates a range."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from minicpm_megatron.engine.zero.adapter import Piece
from minicpm_megatron.engine.zero.partitioned import Partitioned


class FlatPartitions(Partitioned):
    """DeepSpeed maps each parameter (`_hp_mapping`) to the fragment of it that this rank's range holds, if any."""

    def pieces(self, parameter: Any) -> list[Piece]:
        """As `Adapter.pieces`."""
        mapping = parameter._hp_mapping
        if mapping is None:
            return []
        owner = self.inner.param_groups[mapping.param_group_index]["params"][0]
        address = mapping.hp_fragment_address
        return [Piece(mapping.lp_fragment_address.start, mapping.hp_fragment, owner, address.start)]

    def gradient(self, parameter: Any, piece: Piece) -> Tensor:
        """As `Adapter.gradient`."""
        fragment: Tensor = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
        return fragment.reshape(-1)
