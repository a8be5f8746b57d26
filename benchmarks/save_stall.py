"""How long training waits for a save: ours and torch.distributed.checkpoint's, blocking and asynchronous.

    torchrun --nproc_per_node 2 benchmarks/save_stall.py --preset windtunnel-30m

Every rank holds its ZeRO 1 share of the same weights and moments. In every round the four ways save the same tensors
in turn, each followed by training steps until the checkpoint is on the disk. Printed is the median (and the quartiles)
over the rounds of the longest stall on any rank, and of the time until the checkpoint is published. torch's has no
checksums.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any


def build_engine(preset: str, vocab_size: int, sequence_length: int) -> Any:
    """An engine at ZeRO 1 that has made a step, so that there are moments to save."""
    from minicpm_megatron.engine import build as engines
    from minicpm_megatron.model.config import MiniCPMConfig
    from minicpm_megatron.model.initialize import initialize_parameters
    from minicpm_megatron.parallel import groups
    from minicpm_megatron.recipe import build

    recipe = build(
        {
            "name": "save-stall",
            "preset": preset,
            "model": {"vocab_size": vocab_size},
            "data": {"train": [{"prefix": "unused"}], "sequence_length": sequence_length},
            "training": {"global_batch_size": groups.world_size(), "micro_batch_size": 1, "precision": "fp32"},
            "schedule": {"shape": "constant", "total": 1},
            "deepspeed": {"zero_stage": 1},
        }
    )
    layout = recipe.check_world_size(groups.world_size())
    groups.initialize(layout)
    config = MiniCPMConfig.from_recipe(recipe.model, recipe.parallel, precision="fp32", recompute="none")
    model = engines.build_model(config, recipe)
    initialize_parameters(model, config, recipe.training.seed)
    return engines.build_engine(model, config, recipe, layout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="windtunnel-30m", help="shape of the model")
    parser.add_argument("--vocab-size", type=int, default=8192, help="rows of its embedding")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens a rank and step")
    parser.add_argument("--rounds", type=int, default=5, help="saves of each kind")
    parser.add_argument("--directory", help="where to make the folder that is written to (default: as TMPDIR says)")
    arguments = parser.parse_args()

    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    from minicpm_megatron.checkpoint import Checkpointer
    from minicpm_megatron.checkpoint.ranks import Ranks
    from minicpm_megatron.checkpoint.run_state import RunState
    from minicpm_megatron.engine.state import EngineState
    from minicpm_megatron.parallel import groups

    engine = build_engine(arguments.preset, arguments.vocab_size, arguments.sequence_length)
    rank, size = groups.rank(), groups.world_size()
    ids = torch.randint(engine.recipe.model.vocab_size, (1, arguments.sequence_length + 1))
    batch = (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    def step() -> None:
        engine.accumulate([batch], 1)
        engine.step()

    def slowest(value: float) -> float:
        shared = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return float(shared)

    step()
    state = EngineState(engine)
    ranks = Ranks(dist.new_group(backend="gloo"))
    root = Path(ranks.from_first(tempfile.mkdtemp(dir=arguments.directory) if rank == 0 else None))
    ours = Checkpointer(root / "ours", keep_last=1, group=ranks.group)
    theirs = dist.new_group(backend="gloo")
    number = 0

    def tensors() -> dict[str, torch.Tensor]:
        return {
            f"rank-{rank}/{number}": fragment.valid for number, fragment in enumerate(state.fragments())
        }  # whole tensors of this rank: nothing is looked for on the others

    def save_ours(wait: bool) -> Callable[[], bool]:
        ours.save(number, state.fragments(), rank_tensors={}, state=RunState(step=number), facts={}, wait=wait)
        return lambda: wait or ours.settled()

    def save_theirs(wait: bool) -> Callable[[], bool]:
        path = str(root / f"dcp-{number}")
        if wait:
            dcp.save(tensors(), checkpoint_id=path, process_group=theirs)
            return lambda: True
        future: Any = dcp.async_save(tensors(), checkpoint_id=path, process_group=theirs)
        return lambda: future.done()

    ways = {
        "ours, blocking": lambda: save_ours(True),
        "ours, asynchronous": lambda: save_ours(False),
        "torch, blocking": lambda: save_theirs(True),
        "torch, asynchronous": lambda: save_theirs(False),
    }
    stalls: dict[str, list[float]] = {way: [] for way in ways}
    published: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(arguments.rounds + 1):  # the first warms up: buffers, files, threads
        for way, save in ways.items():
            number += 1
            dist.barrier()
            began = time.perf_counter()
            done = save()
            stall = slowest(time.perf_counter() - began)
            while slowest(float(not done())):
                step()
            ours.wait()
            if turn:
                stalls[way].append(stall)
                published[way].append(slowest(time.perf_counter() - began))
            if rank == 0:
                shutil.rmtree(root / f"dcp-{number}", ignore_errors=True)
    if rank == 0:
        shutil.rmtree(root)
        size_mb = sum(parameter.numel() for parameter in engine.module.parameters()) * 12 / 1e6
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "deepspeed", "megatron-core"))
        print(f"{arguments.preset}, {size_mb:,.0f} MB a checkpoint; {size} ranks, {os.cpu_count()} cores; {versions}")
        print("| save | stall, s | quartiles | until published, s | stall against blocking |")
        print("| --- | --- | --- | --- | --- |")
        for way in ways:
            low, middle, high = statistics.quantiles(stalls[way], n=4, method="inclusive")
            whole = statistics.median(stalls[f"{way.split(',')[0]}, blocking"])
            print(
                f"| {way} | {middle:.3f} | {low:.3f} to {high:.3f} | {statistics.median(published[way]):.3f} "
                f"| {middle / whole:.2f} |"
            )
    dist.barrier()
    groups.destroy()


if __name__ == "__main__":
    main()
