"""Small facts exchanged between ranks as JSON inside tensors; nothing is pickled."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """The ranks that save and load together.

    Args:
        group: their process group; None: this process is alone.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def gather(self, value: Any) -> list[Any]:
        """The JSON value of every rank, on every rank."""
        if self.group is None or self.size == 1:
            return [value]
        device = self._device()
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
        length = torch.tensor([content.numel()], device=device)
        lengths = [torch.zeros_like(length) for _ in range(self.size)]
        dist.all_gather(lengths, length, group=self.group)
        longest = max(int(item) for item in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8, device=device)
        padded[: content.numel()] = content
        everyone = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(everyone, padded, group=self.group)
        return [
            json.loads(bytes(item[: int(count)].cpu().numpy())) for item, count in zip(everyone, lengths, strict=True)
        ]

    def from_first(self, value: Any) -> Any:
        """Rank 0's JSON value, on every rank."""
        return self.gather(value if self.rank == 0 else None)[0]

    def _device(self) -> torch.device:
        backend = dist.get_backend(self.group)
        return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")
