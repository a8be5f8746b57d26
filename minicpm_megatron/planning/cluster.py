"""What the machines can do: GPUs by their data sheets, and the time a transfer takes between them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe.checks import refuse_unless
from minicpm_megatron.recipe.gpu_peaks import PEAK_FLOPS

# Fractions of a stated peak that are taken to be reached. Assumptions: none is measured here.
MATRIX_PRODUCT_FRACTION = 0.6
BANDWIDTH_FRACTION = 0.8  # device memory, NVLink and network alike
USABLE_MEMORY = 0.9  # the rest: CUDA context, NCCL, the allocator's slack


@dataclass(frozen=True)
class Gpu:
    """One GPU as its maker states it.

    Attributes:
        flops: dense bf16, FLOP/s.
        memory: bytes.
        memory_bandwidth: bytes/s.
        nvlink: bytes/s to the GPUs of its node, in one direction; PCIe where there is no NVLink.
        network: bytes/s to other nodes, in one direction.
    """

    flops: float
    memory: float
    memory_bandwidth: float
    nvlink: float
    network: float


# Data sheets state NVLink and PCIe for both directions together, network ports in bits per second and direction.
GPUS = {
    # NVIDIA A100 data sheet, SXM: 40 GB, 1,555 GB/s, NVLink 600 GB/s; DGX A100 data sheet: 8 x 200 Gb/s for 8 GPUs
    "a100-40": Gpu(PEAK_FLOPS["NVIDIA A100-SXM4-40GB"], 40e9, 1555e9, 300e9, 25e9),
    # the same: 80 GB, 2,039 GB/s
    "a100-80": Gpu(PEAK_FLOPS["NVIDIA A100-SXM4-80GB"], 80e9, 2039e9, 300e9, 25e9),
    # NVIDIA H100 data sheet, SXM: 80 GB, 3.35 TB/s, NVLink 900 GB/s; DGX H100 user guide: 8 x 400 Gb/s for 8 GPUs
    "h100": Gpu(PEAK_FLOPS["NVIDIA H100 80GB HBM3"], 80e9, 3350e9, 450e9, 50e9),
    # NVIDIA H200 data sheet, SXM: 141 GB, 4.8 TB/s, NVLink 900 GB/s; DGX H200 user guide: 8 x 400 Gb/s for 8 GPUs
    "h200": Gpu(PEAK_FLOPS["NVIDIA H200"], 141e9, 4800e9, 450e9, 50e9),
    # NVIDIA L40S data sheet: 48 GB, 864 GB/s, PCIe 4.0 x16 64 GB/s, no NVLink; it names no network: one 200 Gb/s port
    # for two GPUs is assumed
    "l40s": Gpu(PEAK_FLOPS["NVIDIA L40S"], 48e9, 864e9, 32e9, 12.5e9),
}


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal GPUs, and how long a rank waits for a collective over a group of `size` ranks that lie
    `stride` apart, when all such groups communicate at once.

    Ranks are numbered as Megatron-Core does: tensor fastest, then context, expert and data, pipeline slowest.

    Raises:
        UserError: counts that make no whole nodes.
    """

    gpu: Gpu
    gpus: int
    gpus_per_node: int

    def __post_init__(self) -> None:
        refuse_unless(self.gpus >= 1, "--gpus", f"{self.gpus} is not a number of GPUs", "give 1 or more")
        refuse_unless(
            self.gpus_per_node >= 1, "--gpus-per-node", f"{self.gpus_per_node} GPUs are no node", "give 1 or more"
        )
        refuse_unless(
            self.gpus <= self.gpus_per_node or self.gpus % self.gpus_per_node == 0,
            "--gpus",
            f"{self.gpus} GPUs are no whole nodes of {self.gpus_per_node}",
            "give a multiple, or --gpus-per-node",
        )

    @classmethod
    def of(cls, name: str, gpus: int, gpus_per_node: int) -> Cluster:
        """A cluster of GPUs called `name` in `GPUS`.

        Raises:
            UserError: no such GPU, or counts that make no whole nodes.
        """
        gpu = GPUS.get(name.lower())
        if gpu is None:
            raise UserError(f"unknown GPU {name!r}", where="--gpu", fix=f"give one of {', '.join(GPUS)}")
        return cls(gpu, gpus, gpus_per_node)

    @property
    def usable_memory(self) -> float:
        """Bytes a rank may fill."""
        return self.gpu.memory * USABLE_MEMORY

    def product_seconds(self, flops: float) -> float:
        """Time of matrix products of so many FLOPs on one GPU."""
        return flops / (self.gpu.flops * MATRIX_PRODUCT_FRACTION)

    def memory_seconds(self, moved: float) -> float:
        """Time to read and write `moved` bytes of device memory."""
        return moved / (self.gpu.memory_bandwidth * BANDWIDTH_FRACTION)

    def members_per_node(self, size: int, stride: int) -> int:
        """Ranks of one group that are certain to share a node."""
        span = math.gcd(size * stride, min(self.gpus_per_node, self.gpus))
        return max(1, span // stride)

    def gather_seconds(self, sent: float, size: int, stride: int) -> float:
        """Ring all-gather or reduce-scatter in which each rank sends `sent` = (n - 1) / n of the whole.

        With k of the n ranks in a node, the node takes (n - k) / n of the whole in over the k network ports of the
        group, while NVLink carries `sent`: the longer of the two.
        """
        if size == 1:
            return 0.0
        near = self.members_per_node(size, stride)
        whole = sent * size / (size - 1)
        inside = sent / self.gpu.nvlink if near > 1 else 0.0
        outside = whole * (size - near) / size / (near * self.gpu.network)
        return max(inside, outside) / BANDWIDTH_FRACTION

    def all_to_all_seconds(self, sent: float, size: int, stride: int) -> float:
        """All-to-all in which each rank sends `sent` in equal parts to the n - 1 others: k - 1 of them over NVLink,
        n - k over its own network port, both at once."""
        if size == 1:
            return 0.0
        near = self.members_per_node(size, stride)
        inside = sent * (near - 1) / (size - 1) / self.gpu.nvlink
        outside = sent * (size - near) / (size - 1) / self.gpu.network
        return max(inside, outside) / BANDWIDTH_FRACTION

    def neighbour_seconds(self, sent: float, size: int, stride: int) -> float:
        """`sent` bytes to the next rank of the group; the slowest pair decides."""
        if size == 1:
            return 0.0
        link = self.gpu.nvlink if self.members_per_node(size, stride) == size else self.gpu.network
        return sent / (link * BANDWIDTH_FRACTION)
