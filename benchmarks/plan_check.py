"""The plan's memory and communication against what real training steps allocate and send, over gloo on CPU.

    python -m benchmarks.plan_check                 # every row, as the table of docs/parallelism.md
    python -m benchmarks.plan_check "TP 2" "DP 2"   # rows whose name begins so

Memory is the storage of all tensors that exist at once, from before the model is built, as torch's operators return
them and Python's weak references see them go (torch's own MemTracker works so; its profiler misses what gloo's threads
let go last). The peak is taken over the second step, when Adam's moments exist. Growth of the process's resident
memory, which also has the allocator's slack, oneDNN's scratch and messages on their way, stands beside it.
Communication is what reaches torch.distributed's operators below all of Megatron-Core, DeepSpeed and this package,
weighed as `planning.communication` weighs it: by what a ring sends.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.utils._python_dispatch import TorchDispatchMode

from minicpm_megatron.engine.build import build_engine, build_model
from minicpm_megatron.model.config import MiniCPMConfig
from minicpm_megatron.model.initialize import initialize_parameters
from minicpm_megatron.parallel import groups
from minicpm_megatron.planning import Cluster
from minicpm_megatron.planning.communication import Work, all_traffic
from minicpm_megatron.recipe import Recipe, build
from minicpm_megatron.recipe.memory import pipeline_stages, stage_memory
from tests.distributed.forked import run_forked

MODEL = {
    "num_layers": 4,
    "hidden_size": 256,
    "ffn_hidden_size": 640,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 32,
    "vocab_size": 2048,
}
MICRO_BATCH, LENGTH, SHORT = 2, 512, 16  # with short samples weights, gradients and optimizer are nearly all there is
# a bucket for gradients of this model's size; the default is 500 million elements
DEEPSPEED = {"zero_optimization": {"reduce_bucket_size": 500_000}}
UNEVEN = 0.05  # the plan takes experts to be used alike
SMALL = 256  # bytes; below are norms, losses to be printed and flags, which the plan leaves out

REDUCTIONS = ("allreduce_", "reduce_", "reduce_scatter_", "_reduce_scatter_base_")


def case(ranks: int, **changes: Any) -> dict[str, Any]:
    """A row: recipe fields of a layout with sizes tp, pp, cp, ep and settings zero, sp, kind, precision, recompute,
    length, micro_batch, micro_batches, optimizer and model."""
    tp, pp, cp = (changes.get(size, 1) for size in ("tp", "pp", "cp"))
    micro_batch = changes.get("micro_batch", MICRO_BATCH)
    micro_batches = changes.get("micro_batches", 4 if pp > 1 else 2)
    return {
        "ranks": ranks,
        "recipe": {
            "name": "plan-check",
            "preset": "minicpm-nano",
            "model": MODEL | {"max_position_embeddings": LENGTH} | changes.get("model", {}),
            "data": {"train": [{"prefix": "unread"}], "sequence_length": changes.get("length", LENGTH)},
            "parallel": {
                "tensor_model_parallel_size": tp,
                "pipeline_model_parallel_size": pp,
                "context_parallel_size": cp,
                "cp_comm_type": changes.get("kind", "p2p"),
                "expert_model_parallel_size": changes.get("ep", 1),
                "sequence_parallel": changes.get("sp", False),
            },
            "training": {
                "micro_batch_size": micro_batch,
                "global_batch_size": micro_batch * micro_batches * ranks // (tp * pp * cp),
                "precision": changes.get("precision", "fp32"),
                "recompute": changes.get("recompute", "none"),
            },
            "optimizer": {"name": changes.get("optimizer", "adamw")},
            "schedule": {"shape": "constant", "total": 10},
            "deepspeed": {"zero_stage": changes.get("zero", 0)},
        },
    }


BF16: dict[str, Any] = {"precision": "bf16"}
SP: dict[str, Any] = {"tp": 2, "sp": True}
EXPERTS: dict[str, Any] = {"model": {"num_moe_experts": 4}}
MUON: dict[str, Any] = {"optimizer": "muon"}
# one sample of 32,768 tokens over the whole vocabulary of MiniCPM-2.4B: logits in fp32 alone would be 16 GB
WHOLE: dict[str, Any] = {
    "length": 32_768,
    "micro_batch": 1,
    "micro_batches": 1,
    "model": {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 160,
        "kv_channels": 16,
        "num_attention_heads": 4,
        "num_query_groups": 4,
        "vocab_size": 122_753,
        "max_position_embeddings": 32_768,
    },
}
ROWS = {
    "1 rank": case(1),
    "1 rank, bf16": case(1, **BF16),
    "1 rank, selective": case(1, recompute="selective"),
    "1 rank, full": case(1, recompute="full"),
    "1 rank, ZeRO 1, bf16, full": case(1, zero=1, recompute="full", **BF16),
    **{f"DP 2, ZeRO {zero}": case(2, zero=zero) for zero in range(4)},
    **{f"DP 2, ZeRO {zero}, bf16": case(2, zero=zero, **BF16) for zero in range(4)},
    **{f"DP 2, ZeRO {zero}, bf16, short": case(2, zero=zero, length=SHORT, **BF16) for zero in range(4)},
    "DP 2, ZeRO 3, full": case(2, zero=3, recompute="full"),
    "DP 2, ZeRO 1, untied": case(2, zero=1, model={"untie_embeddings_and_output_weights": True}),
    "TP 2": case(2, tp=2),
    "TP 2, ZeRO 1, bf16, full": case(2, tp=2, zero=1, recompute="full", **BF16),
    "TP 2 SP": case(2, **SP),
    "TP 2 SP, ZeRO 1, bf16": case(2, zero=1, **SP, **BF16),
    "TP 2 SP, full": case(2, recompute="full", **SP),
    "CP 2 ring": case(2, cp=2),
    "CP 2 ring, ZeRO 1, bf16": case(2, cp=2, zero=1, **BF16),
    "CP 2 ring, ZeRO 3, full": case(2, cp=2, zero=3, recompute="full"),
    "CP 2 Ulysses": case(2, cp=2, kind="a2a"),
    "CP 2 Ulysses, ZeRO 2, bf16, selective": case(2, cp=2, kind="a2a", zero=2, recompute="selective", **BF16),
    "PP 2": case(2, pp=2),
    "PP 2, ZeRO 1, full": case(2, pp=2, zero=1, recompute="full"),
    "PP 2, ZeRO 1, bf16": case(2, pp=2, zero=1, **BF16),
    "TP 2 SP DP 2, ZeRO 2": case(4, zero=2, **SP),
    "TP 2 SP DP 2, ZeRO 3, bf16": case(4, zero=3, **SP, **BF16),
    "PP 2 TP 2": case(4, pp=2, tp=2),
    "PP 2 TP 2 SP, ZeRO 1, bf16": case(4, pp=2, zero=1, **SP, **BF16),
    "PP 2 DP 2, ZeRO 1": case(4, pp=2, zero=1),
    "CP 2 Ulysses TP 2 SP, ZeRO 1": case(4, cp=2, kind="a2a", zero=1, **SP),
    "CP 4 ring, ZeRO 2": case(4, cp=4, zero=2),
    "PP 4, ZeRO 1, bf16": case(4, pp=4, zero=1, micro_batches=8, **BF16),
    "experts, 1 rank": case(1, **EXPERTS),
    "experts, 1 rank, ZeRO 1, bf16": case(1, zero=1, **EXPERTS, **BF16),
    "experts, 1 rank, full": case(1, recompute="full", **EXPERTS),
    "experts, DP 2, ZeRO 3, bf16": case(2, zero=3, **EXPERTS, **BF16),
    "experts, EP 2": case(2, ep=2, **EXPERTS),
    "experts, EP 2, ZeRO 1": case(2, ep=2, zero=1, **EXPERTS),
    "experts, EP 2, ZeRO 2, bf16": case(2, ep=2, zero=2, **EXPERTS, **BF16),
    "experts, EP 2, ZeRO 1, bf16, full": case(2, ep=2, zero=1, recompute="full", **EXPERTS, **BF16),
    "experts, DP 4 EP 2, ZeRO 1": case(4, ep=2, zero=1, **EXPERTS),
    "experts, CP 2 EP 2, ZeRO 1": case(2, cp=2, ep=2, zero=1, **EXPERTS),
    "experts, PP 2 EP 2, ZeRO 1": case(4, pp=2, ep=2, zero=1, **EXPERTS),
    "DP 2, ZeRO 2, short": case(2, zero=2, length=SHORT),
    **{f"Muon, DP 2, ZeRO {zero}, short": case(2, zero=zero, length=SHORT, **MUON) for zero in range(4)},
    "Muon, TP 2 SP, ZeRO 1, bf16": case(2, zero=1, **SP, **BF16, **MUON),
    "Muon, experts, EP 2, ZeRO 1": case(2, ep=2, zero=1, **EXPERTS, **MUON),
    "32K tokens, 122,753 words, CP 2 Ulysses TP 2 SP, ZeRO 1": case(4, cp=2, kind="a2a", zero=1, **SP, **WHOLE),
}


class Recorder(TorchDispatchMode):
    """Sees every operator: tensors that exist, and what torch.distributed sends.

    Attributes:
        level, peak: bytes of all tensors now, and the most there were since it was last set.
        sent: bytes by kind since it was last cleared.
        kind: of all that is sent now; None: operator and group tell it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.level = self.peak = 0
        self.alive: set[int] = set()
        self.sent: Counter[str] = Counter()
        self.kind: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in _tensors(results):
            if not tensor.is_meta:  # DeepSpeed keeps shapes in tensors without storage
                self._note(tensor.untyped_storage())
        if func.namespace == "c10d":
            named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
            # the first argument is what is sent, or the whole of a gather; of a scatter it is the part
            size = sum(tensor.nbytes for tensor in _tensors(args[0]))
            if size >= SMALL:
                group = dist.ProcessGroup.unbox(named["process_group"])
                self._count(func._schema.name.removeprefix("c10d::"), size, group)
        return results

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            weakref.finalize(storage, self._forget, key, size)
            self.level += size
            self.peak = max(self.peak, self.level)

    def _forget(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.level -= size

    def _count(self, operator: str, size: int, group: dist.ProcessGroup) -> None:
        ranks = group.size()
        if operator == "recv_" or ranks == 1:
            return
        if operator in ("reduce_scatter_", "_reduce_scatter_base_"):
            size *= ranks
        if operator != "send":
            size = size * (ranks - 1) // ranks
        if operator == "allreduce_":
            size *= 2
        self.sent[self.kind or _kind(operator, group)] += size


def _tensors(argument: Any) -> Iterator[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, list | tuple):
        for inner in argument:
            yield from _tensors(inner)


def _kind(operator: str, group: dist.ProcessGroup) -> str:
    if operator == "alltoall_base_" and parallel_state.get_expert_model_parallel_world_size() > 1:
        return "expert"
    if operator == "alltoall_base_" or (operator == "send" and parallel_state.get_context_parallel_world_size() > 1):
        return "context"
    if operator == "send" or _within(group, parallel_state.get_pipeline_model_parallel_group()):
        return "pipeline"
    if _within(group, parallel_state.get_tensor_model_parallel_group()):
        return "tensor"
    return "gradients" if operator in REDUCTIONS else "weights"


def _within(group: dist.ProcessGroup, other: dist.ProcessGroup) -> bool:
    return set(dist.get_process_group_ranks(group)) <= set(dist.get_process_group_ranks(other))


def measure(rank: int, case: dict[str, Any]) -> dict[str, Any]:
    """One row on one rank, for `run_forked`: predicted and measured bytes of the peak, and sent by kind in a step."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(DEEPSPEED, file)
        file.flush()
        fields = case["recipe"] | {"deepspeed": case["recipe"]["deepspeed"] | {"config": file.name}}
        recipe = build(fields)
        return _train(recipe) | _predict(recipe)


def _predict(recipe: Recipe) -> dict[str, Any]:
    layout = recipe.check_world_size(dist.get_world_size())
    stage = pipeline_stages(recipe, layout)[parallel_state.get_pipeline_model_parallel_rank()]
    work = Work(recipe, layout, Cluster.of("h100", layout.world_size, layout.world_size), stage)
    sent = {each.kind: each.sent(layout.gradient_accumulation_steps[0]) for each in all_traffic(work)}
    return {"predicted": stage_memory(recipe, layout, stage, fused_norm=False).total, "predicted_sent": sent}


def _train(recipe: Recipe) -> dict[str, Any]:
    layout = recipe.check_world_size(dist.get_world_size())
    resident = _status("VmRSS")
    with Recorder() as recorder:
        groups.initialize(layout)
        config = MiniCPMConfig.from_recipe(
            recipe.model,
            recipe.parallel,
            precision=recipe.training.precision,
            recompute=recipe.training.recompute,
        )
        model = build_model(config, recipe)
        initialize_parameters(model, config, seed=1)
        engine = build_engine(model, config, recipe, layout)
        if (matrices := getattr(engine.zero.inner, "matrices", None)) is not None:
            matrices.transform = _counted_as(recorder, "matrices", matrices.transform)
        engine.train()
        count = layout.gradient_accumulation_steps[0]
        shape = (layout.micro_batch_size, recipe.data.sequence_length // layout.context_parallel_size)
        # of all kinds, so that experts are used alike
        chance = torch.Generator().manual_seed(dist.get_rank())
        tokens = [torch.randint(recipe.model.vocab_size, shape, generator=chance) for _ in range(count)]
        for _ in range(2):
            recorder.peak = recorder.level
            recorder.sent.clear()
            engine.accumulate(iter([(each, each) for each in tokens]), count)
            engine.step()
    return {"peak": recorder.peak, "resident": _status("VmHWM") - resident, "sent": dict(recorder.sent)}


def _counted_as(recorder: Recorder, kind: str, function: Callable[..., None]) -> Callable[..., None]:
    def counted(*arguments: Any) -> None:
        recorder.kind = kind
        function(*arguments)
        recorder.kind = None

    return counted


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def worst_sent_ratio(results: list[dict[str, Any]]) -> float:
    """Of all ranks and kinds the predicted over the counted bytes that is furthest from 1; infinite for a kind that
    only one of them knows."""
    pairs = [
        (result["predicted_sent"].get(kind, 0), result["sent"].get(kind, 0))
        for result in results
        for kind in {**result["predicted_sent"], **result["sent"]}
    ]
    known = [pair for pair in pairs if any(pair)]
    ratios = [predicted / counted if all((predicted, counted)) else math.inf for predicted, counted in known]
    return max(ratios, key=lambda ratio: abs(ratio - 1), default=1.0)


def main() -> int:
    """Print the table; the exit status says whether all ranks are within 10 % in memory and 1 % in what they send (5 %
    where that depends on the load of experts)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="beginnings of names (default: all rows)")
    wanted = tuple(parser.parse_args().rows) or ("",)
    rows = {name: row for name, row in ROWS.items() if name.startswith(wanted)}
    outcomes = run_forked("benchmarks.plan_check:measure", list(rows.values()))
    print("| layout | predicted MB | measured MB | ratio | resident MB | sent MB | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    sound = True
    for name, ranks in zip(rows, outcomes, strict=True):
        failed = [rank.log for rank in ranks if rank.result is None]
        if failed:
            print(f"{name}\n{failed[0][-3000:]}", file=sys.stderr)
            return 1
        results = [rank.result for rank in ranks]
        fullest = max(results, key=lambda result: result["peak"])
        memory = max((result["predicted"] / result["peak"] for result in results), key=lambda ratio: abs(ratio - 1))
        numbers = [f"{fullest[key] / 1e6:.1f}" for key in ("predicted", "peak")]
        most = {kind: max(result["sent"].get(kind, 0) for result in results) for kind in results[0]["predicted_sent"]}
        sent = ", ".join(f"{kind} {size / 1e6:.2f}" for kind, size in most.items() if size)
        ratio = worst_sent_ratio(results)
        cells = [name, *numbers, f"{memory:.3f}", f"{fullest['resident'] / 1e6:.0f}", sent or "-", f"{ratio:.4f}"]
        print(f"| {' | '.join(cells)} |")
        sound = sound and abs(memory - 1) < 0.1 and abs(ratio - 1) < (UNEVEN if "experts" in name else 0.01)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
