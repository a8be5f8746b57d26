"""Cases that run on the pretended machine: names and settings, without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelCase:
    """Forward and backward of a model at MiniCPM-2.4B's widths, sequences of 4,096 tokens, one a micro-batch.

    Attributes:
        parallel: section of the recipe.
        training: keys of the section beside batch sizes.
        preset: shape, but for the number of layers.
        documents: packed into each sample, equally long; 0: attention goes over all of it.
    """

    parallel: dict[str, Any]
    training: dict[str, Any]
    preset: str = "minicpm-2.4b"
    documents: int = 0

    @property
    def world_size(self) -> int:
        """Ranks, none of them data-parallel."""
        sizes = (value for key, value in self.parallel.items() if key.endswith("_parallel_size"))
        return max([1, *sizes])


@dataclass(frozen=True)
class EngineCase:
    """Two steps of two micro-batches, of four samples each, under DeepSpeed.

    Attributes:
        deepspeed, parallel, optimizer: sections of the recipe.
    """

    world_size: int
    deepspeed: dict[str, Any]
    precision: str = "bf16"
    preset: str = "minicpm-2.4b"
    parallel: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)

    @property
    def replicas(self) -> int:
        """Ranks that have samples of their own."""
        return self.world_size // int(self.parallel.get("pipeline_model_parallel_size", 1))


def _models() -> dict[str, ModelCase]:
    cases = {}
    for tp, sequence_parallel in ((1, False), (2, False), (2, True), (4, False), (4, True)):
        for recompute in ("none", "selective", "full"):
            parallel = {"tensor_model_parallel_size": tp, "sequence_parallel": sequence_parallel}
            name = f"TP {tp}{' SP' if sequence_parallel else ''} recompute {recompute}"
            cases[name] = ModelCase(parallel, {"recompute": recompute})
    cases["fp32"] = ModelCase({}, {"precision": "fp32"})
    cases["whole logits"] = ModelCase({}, {"fused_loss": False})
    cases["4 documents"] = ModelCase({}, {}, documents=4)
    for way, kind in (("ring", "p2p"), ("Ulysses", "a2a")):
        cases[f"CP 2 {way}"] = ModelCase({"context_parallel_size": 2, "cp_comm_type": kind}, {})
    for name, parallel in (
        ("", {}),
        (" EP 2", {"expert_model_parallel_size": 2}),
        (" TP 2 SP", {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    ):
        cases[f"MoE{name}"] = ModelCase(parallel, {}, preset="minicpm-moe-8x2b")
    return cases


def _engines() -> dict[str, EngineCase]:
    cases = {
        f"ZeRO {stage} world {world} {precision}": EngineCase(world, {"zero_stage": stage}, precision)
        for world in (1, 8)
        for stage in range(4)
        for precision in ("bf16", "fp32")
    }
    for stage in (2, 3):
        offload = {"zero_stage": stage, "offload_optimizer": "cpu"}
        cases[f"ZeRO {stage} world 8 bf16 offload"] = EngineCase(8, offload)
    experts = {"expert_model_parallel_size": 2}
    cases["ZeRO 1 world 8 bf16 MoE EP 2"] = EngineCase(8, {"zero_stage": 1}, "bf16", "minicpm-moe-8x2b", experts)
    # which parts other ranks hold is known where all hold the same: alone, and without ZeRO
    for world, stage in ((1, 1), (1, 2), (1, 3), (8, 0)):
        name = f"ZeRO {stage} world {world} bf16 Muon"
        cases[name] = EngineCase(world, {"zero_stage": stage}, optimizer={"name": "muon"})
    pipeline = {"pipeline_model_parallel_size": 2}
    cases["ZeRO 1 world 8 bf16 PP 2"] = EngineCase(8, {"zero_stage": 1}, parallel=pipeline)
    return cases


MODELS = _models()
ENGINES = _engines()

ARCHITECTURES = (80, 90)
PRECISIONS = ("bf16", "fp16", "fp32")
AS_RUN, PACKED = "as run", "packed"
"""122,753 logits a token: as the fused loss lays them (122,880 apart), and without a gap between tokens."""


def kernel_case(kernel: str, architecture: int, precision: str, logits: str) -> str:
    """Name of one compilation; kernels are the functions of `fused_loss_triton`."""
    return f"{kernel} sm_{architecture} {precision} {logits}"


KERNELS = [
    kernel_case(kernel, architecture, precision, logits)
    for kernel in ("_statistics", "_differentiate")
    for architecture in ARCHITECTURES
    for precision in PRECISIONS
    for logits in (AS_RUN, PACKED)
]
