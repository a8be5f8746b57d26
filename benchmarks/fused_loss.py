"""LM head and loss side by side: time against the matrix products alone, and memory.

    python -m benchmarks.fused_loss --tokens 2048 --rounds 7
    python -m benchmarks.fused_loss --tokens 2048 --tensor-parallel 2
    python -m benchmarks.fused_loss --tokens 65536 --rounds 1 --candidates fused
    python -m benchmarks.fused_loss --device cuda --tokens 32768 --rounds 21

A candidate makes the mean loss of random hidden states and labels and both gradients. Its time is divided by that of
`floor` in the same round: the three matrix products of 6 T V H operations and nothing else. Time is the process's CPU
time, so that other work on the machine disturbs little, and on CUDA wall time. TFLOP/s are those of 6 T V H operations,
whatever a candidate computes twice. Memory is what the process (on CUDA: the allocator) held more at its peak than
before, gradients included. Peers that are not installed, or fail, are left out, with the reason.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from benchmarks import fused_loss_peers
from minicpm_megatron import VocabParallelLinearCrossEntropy

PACKAGES = ("torch", "megatron-core", "deepspeed", "cut-cross-entropy", "liger-kernel", "triton")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GIB = 2**30
Step = Callable[[], torch.Tensor]
Taken = tuple[float, float, int, float]
"""Times the floor, seconds, bytes beyond what there was, loss."""


@dataclass(frozen=True)
class Case:
    """What is measured; sizes are those of the whole head."""

    tokens: int
    hidden: int
    vocabulary: int
    dtype: str
    device: str
    ranks: int
    threads: int
    rounds: int
    candidates: tuple[str, ...]

    @property
    def flops(self) -> float:
        """TFLOP/s of the three matrix products over all ranks."""
        return 6.0 * self.tokens * self.vocabulary * self.hidden


class Inputs:
    """What all candidates share on one rank."""

    def __init__(self, case: Case, rank: int) -> None:
        generator = torch.Generator().manual_seed(1)
        rows = -(-case.vocabulary // case.ranks)
        self.group = dist.group.WORLD if case.ranks > 1 else None
        self.vocabulary, self.tokens = case.vocabulary, case.tokens
        hidden = torch.randn(case.tokens, case.hidden, generator=generator).to(DTYPES[case.dtype])
        self.labels = torch.randint(case.vocabulary, (case.tokens,), generator=generator).to(case.device)
        weight = torch.empty(rows, case.hidden, dtype=DTYPES[case.dtype])
        generator.manual_seed(2 + rank)
        for part in weight.split(4096):
            part.copy_(torch.randn(part.shape, generator=generator) / case.hidden**0.5)
        self.hidden = hidden.to(case.device).requires_grad_()
        self.weight = torch.nn.Parameter(weight.to(case.device))

    def clear(self) -> None:
        """Drop the gradients."""
        self.hidden.grad = self.weight.grad = None


def ours(inputs: Inputs, **settings: Any) -> Step:
    """VocabParallelLinearCrossEntropy's own mean."""
    loss = VocabParallelLinearCrossEntropy(vocab_size=inputs.vocabulary, group=inputs.group, **settings)
    return lambda: loss(inputs.hidden, inputs.weight, inputs.labels)


def ours_per_token(inputs: Inputs) -> Step:
    """Losses a token whose mean is taken outside, as the trainer does."""
    loss = VocabParallelLinearCrossEntropy(reduction="none", vocab_size=inputs.vocabulary, group=inputs.group)
    return lambda: loss(inputs.hidden, inputs.weight, inputs.labels).mean()


def floor(inputs: Inputs) -> Step:
    """The matrix products alone, outputs included, over slices of tokens whose logits take at most 1 GiB."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    slices = max(1, -(-hidden.size(0) * weight.size(0) * hidden.element_size() // GIB))
    parts = hidden.chunk(slices)
    logits = hidden.new_zeros(parts[0].size(0), weight.size(0))
    entry, head = torch.zeros_like(hidden), torch.zeros_like(weight)

    def step() -> torch.Tensor:
        for part, out in zip(parts, entry.chunk(slices), strict=True):
            mine = logits[: part.size(0)]
            torch.mm(part, weight.t(), out=mine)
            torch.mm(mine, weight, out=out)
            torch.mm(mine.t(), part, out=head)
        return logits.new_zeros(())

    return step


CANDIDATES: dict[str, Callable[[Inputs], Step]] = {
    "fused": ours,
    "fused, mean outside": ours_per_token,
    "fused, gradient in backward": lambda inputs: ours(inputs, gradient_in="backward"),
    **fused_loss_peers.CANDIDATES,
}


class Measure:
    """Time and memory of one step on one rank."""

    def __init__(self, inputs: Inputs, cuda: bool) -> None:
        self.inputs, self.cuda = inputs, cuda

    def __call__(self, step: Step, *, backward: bool) -> tuple[float, int, float]:
        """(seconds, bytes beyond what there was, loss)."""
        self.inputs.clear()
        gc.collect()
        self._wait()
        before = self._reset()
        clock = time.perf_counter if self.cuda else time.process_time
        began = clock()
        loss = step()
        if backward:
            loss.backward()
        self._wait()
        seconds = clock() - began
        return seconds, self._peak() - before, float(loss.detach())

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        if dist.is_initialized():
            dist.barrier()

    def _reset(self) -> int:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
        return _status("VmRSS")

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measure(rank: int, case: Case, store: str, results: Any) -> None:
    """One rank: every candidate in every round, in an order of chance; puts {name: [(ratio, seconds, bytes), ...]}."""
    torch.set_num_threads(case.threads)
    if case.ranks > 1:
        backend = "nccl" if case.device == "cuda" else "gloo"
        if case.device == "cuda":
            torch.cuda.set_device(rank)
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=case.ranks)
    inputs = Inputs(case, rank)
    take, skipped, steps = Measure(inputs, case.device == "cuda"), {}, {}
    for name in case.candidates:
        try:
            steps[name] = CANDIDATES[name](inputs)
            take(steps[name], backward=True)  # compiles, tunes, fills pools
        except Exception as error:  # a peer's kernel that does not compile, or a lack of memory, is its own row's
            steps.pop(name, None)
            told = isinstance(error, ImportError | fused_loss_peers.Unfit)
            reason = (str(error).splitlines() or [""])[0]
            skipped[name] = reason if told and reason else f"{type(error).__name__}: {reason}"
    found: dict[str, list[Taken]] = {name: [] for name in steps}
    order = random.Random(3)
    base_step = floor(inputs)
    base_step()
    for _ in range(case.rounds):
        base = take(base_step, backward=False)[0]
        for name in order.sample(list(steps), len(steps)):
            seconds, size, loss = take(steps[name], backward=True)
            found[name].append((seconds / base, seconds, size, loss))
    results.put((rank, found, skipped))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _over_ranks(ranks: list[dict[str, list[Taken]]]) -> dict[str, list[list[float]]]:
    """Candidate -> its numbers by kind, of several ranks the slower and the fuller."""
    found = {}
    for name in ranks[0]:
        turns = zip(*(rank[name] for rank in ranks), strict=True)
        largest = [[max(values) for values in zip(*turn, strict=True)] for turn in turns]
        found[name] = [list(numbers) for numbers in zip(*largest, strict=True)]
    return found


def medians(case: Case, ranks: list[dict[str, list[Taken]]]) -> dict[str, dict[str, float]]:
    """Candidate -> times the floor, seconds, TFLOP/s and GiB."""
    found = {}
    for name, (ratios, seconds, sizes, _) in _over_ranks(ranks).items():
        middle = statistics.median(seconds)
        found[name] = {
            "ratio": statistics.median(ratios),
            "seconds": middle,
            "tflops": case.flops / middle / 1e12,
            "gib": statistics.median(sizes) / GIB,
        }
    return found


def table(case: Case, ranks: list[dict[str, list[Taken]]]) -> list[str]:
    """Rows of a Markdown table."""
    rows = ["| loss | times the floor (quartiles) | seconds | TFLOP/s | GiB, gradients included |", f"|{' --- |' * 5}"]
    gradient = -(-case.vocabulary // case.ranks) * case.hidden * DTYPES[case.dtype].itemsize
    all_losses, middles = [], medians(case, ranks)
    for name, (ratios, _, _, losses) in _over_ranks(ranks).items():
        all_losses += losses
        low, middle, high = _quartiles(ratios)
        own = middles[name]
        cells = [f"{own['seconds']:.3g}", f"{own['tflops']:.3g}", f"{own['gib']:.2f}"]
        rows.append(f"| {name} | {middle:.3f} ({low:.3f} to {high:.3f}) | {' | '.join(cells)} |")
    rows.append(f"\ngradient of the head alone: {gradient / GIB:.2f} GiB; loss {min(all_losses):.4f}")
    if max(all_losses) - min(all_losses) > 0.01 * min(all_losses):  # bf16 rounds logits, and some peers the loss
        rows.append(f"losses differ: up to {max(all_losses):.4f}")
    return rows


def _quartiles(values: Any) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} absent"


def main() -> None:
    """Print versions and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=2304)
    parser.add_argument("--vocabulary", type=int, default=122_753)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="RANKS")
    parser.add_argument("--threads", type=int, default=1, help="of a rank")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES), metavar="NAME")
    parser.add_argument("--json", action="store_true", help="medians and reasons for what is left out, as a last line")
    given = parser.parse_args()
    case = Case(
        tokens=given.tokens,
        hidden=given.hidden,
        vocabulary=given.vocabulary,
        dtype=given.dtype,
        device=given.device,
        ranks=given.tensor_parallel,
        threads=given.threads,
        rounds=given.rounds,
        candidates=tuple(given.candidates),
    )
    print(", ".join(_version(package) for package in PACKAGES))
    print(case)
    results = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (case, f"{folder}/store", results)
        context = multiprocessing.start_processes(measure, arguments, nprocs=case.ranks, join=False)
        answers = sorted((results.get() for _ in range(case.ranks)), key=lambda answer: answer[0])
        while not context.join():
            pass
    ranks, left_out = [found for _, found, _ in answers], answers[0][2]
    print("\n".join(table(case, ranks)))
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    if given.json:
        print(json.dumps({"losses": medians(case, ranks), "left_out": left_out}))


if __name__ == "__main__":
    main()
