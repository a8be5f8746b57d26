"""What ZeRO 1 costs: training steps of the same shape and tokens on CPU ranks over gloo, side by side.

    python benchmarks/zero1_step.py --preset windtunnel-30m --sequence-length 256 --micro-batch 2 --accumulation 4

Three candidates, each in processes of its own, take turns within every round:

    zero1  MiniCPMModel under `engine.Engine` at ZeRO 1: what examples/train.py does for a step
    ddp    the same MiniCPMModel without DeepSpeed: torch's DistributedDataParallel, AdamW on the same muP groups and
           clip_grad_norm_
    llama  transformers' LlamaForCausalLM of the same shape under DeepSpeed's ZeRO 1 as it comes

CPU-seconds are user and system time of all ranks, so that other work on the machine disturbs little.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

PACKAGES = ("torch", "deepspeed", "megatron-core", "transformers")
BATCHES = 8  # random ones, gone through again and again


@dataclass(frozen=True)
class Case:
    """What every candidate trains; sizes in samples are of one rank."""

    preset: str
    vocab_size: int
    sequence_length: int
    micro_batch: int
    accumulation: int
    precision: str
    ranks: int

    @property
    def tokens(self) -> int:
        """Tokens of one step over all ranks."""
        return self.ranks * self.accumulation * self.micro_batch * self.sequence_length

    def recipe(self) -> Any:
        """The recipe of a run of this case, all else at its defaults."""
        from minicpm_megatron.recipe import build

        return build(
            {
                "name": "benchmark",
                "preset": self.preset,
                "model": {"vocab_size": self.vocab_size},
                "data": {"train": [{"prefix": "unused"}], "sequence_length": self.sequence_length},
                "training": {
                    "global_batch_size": self.ranks * self.accumulation * self.micro_batch,
                    "micro_batch_size": self.micro_batch,
                    "precision": self.precision,
                },
                "schedule": {"shape": "constant", "total": 1000},
                "deepspeed": {"zero_stage": 1},
            }
        )

    def batches(self, rank: int) -> list[list[Any]]:
        """(tokens, labels) of the micro-batches of BATCHES steps, int64 [micro_batch, sequence_length] each."""
        import torch

        generator = torch.Generator().manual_seed(rank)
        shape = (BATCHES, self.accumulation, self.micro_batch, self.sequence_length + 1)
        rows = torch.randint(self.vocab_size, shape, generator=generator)
        return [[(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in step] for step in rows]


Step = Callable[[list[Any]], None]


def _minicpm(case: Case) -> Any:
    from minicpm_megatron.engine.build import build_model
    from minicpm_megatron.model.config import MiniCPMConfig
    from minicpm_megatron.model.initialize import initialize_parameters

    recipe = case.recipe()
    config = MiniCPMConfig.from_recipe(recipe.model, recipe.parallel, precision=case.precision)
    model = build_model(config, recipe)
    initialize_parameters(model, config, seed=1)
    return recipe, config, model


def zero1(case: Case) -> Step:
    from minicpm_megatron.engine.build import build_engine
    from minicpm_megatron.training import guards

    recipe, config, model = _minicpm(case)
    engine = build_engine(model, config, recipe, recipe.check_world_size(case.ranks))
    engine.train()

    def step(micro_batches: list[Any]) -> None:
        engine.set_rates(1.0)
        guards.exchange(engine.accumulate(micro_batches, len(micro_batches)), stop=False, saved=False)
        assert engine.step().applied

    return step


def ddp(case: Case) -> Step:
    import contextlib

    import torch
    from megatron.core import parallel_state

    from minicpm_megatron.methods.mup import mup_param_groups
    from minicpm_megatron.training import guards

    recipe, config, model = _minicpm(case)
    settings = recipe.optimizer
    groups = mup_param_groups(model, config, lr=settings.lr, weight_decay=settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
    parallel = torch.nn.parallel.DistributedDataParallel(
        model, process_group=parallel_state.get_data_parallel_group(), gradient_as_bucket_view=True
    )

    def step(micro_batches: list[Any]) -> None:
        total = torch.zeros(())
        for number, (tokens, labels) in enumerate(micro_batches, 1):
            with contextlib.nullcontext() if number == len(micro_batches) else parallel.no_sync():
                loss = parallel(tokens, labels=labels).mean() / len(micro_batches)
                loss.backward()
            total += loss.detach()
        guards.exchange(total, stop=False, saved=False)
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.training.gradient_clipping, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()

    return step


def llama(case: Case) -> Step:
    import deepspeed
    import torch
    import transformers

    recipe = case.recipe()
    shape, settings = recipe.model, recipe.optimizer
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.ffn_hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_query_groups,
            head_dim=shape.kv_channels,
            max_position_embeddings=case.sequence_length,
            rms_norm_eps=shape.norm_epsilon,
            tie_word_embeddings=not shape.untie_embeddings_and_output_weights,
            use_cache=False,
            attn_implementation="sdpa",
        )
    ).to({"fp32": torch.float32, "bf16": torch.bfloat16}[case.precision])
    # otherwise DeepSpeed compiles an all-reduce that it uses in inference only, for half a minute
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(
            model.parameters(), settings.lr, settings.betas, settings.eps, settings.weight_decay, fused=True
        ),
        config={
            "train_micro_batch_size_per_gpu": case.micro_batch,
            "gradient_accumulation_steps": case.accumulation,
            "gradient_clipping": recipe.training.gradient_clipping,
            "bf16": {"enabled": case.precision == "bf16"},
            "zero_optimization": {"stage": 1},
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1_000_000_000,
        },
        dist_init_required=False,
    )

    def step(micro_batches: list[Any]) -> None:
        for tokens, _ in micro_batches:  # it shifts the labels itself
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            engine.step()

    return step


CANDIDATES = {candidate.__name__: candidate for candidate in (zero1, ddp, llama)}


def _rank(name: str, case: Case, rank: int, store: str, pipe: Connection) -> None:
    """One rank of a candidate: takes as many steps as it is told, and answers (CPU-seconds, wall seconds)."""
    os.environ.update(
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.ranks), "OMP_NUM_THREADS": "1"}
    )
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch.distributed as dist

    from minicpm_megatron.parallel import groups

    groups.initialize(case.recipe().check_world_size(case.ranks), init_method=f"file://{store}")
    batches = case.batches(rank)
    step = CANDIDATES[name](case)
    done = 0
    pipe.send(None)
    for steps in iter(pipe.recv, None):
        dist.barrier()
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(steps):
            step(batches[done % BATCHES])
            done += 1
        dist.barrier()
        pipe.send((time.process_time() - cpu, time.perf_counter() - wall))
    groups.destroy()


class Job:
    """The ranks of one candidate, waiting between its turns."""

    def __init__(self, name: str, case: Case, folder: str) -> None:
        self.case = case
        spawn = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(case.ranks):
            pipe, other = spawn.Pipe()
            self.processes.append(
                spawn.Process(target=_rank, args=(name, case, rank, f"{folder}/{name}", other), daemon=True)
            )
            self.processes[-1].start()
            other.close()  # so that a rank that dies is met as an end of file
            self.pipes.append(pipe)
        for pipe in self.pipes:
            pipe.recv()

    def take(self, steps: int) -> tuple[float, float]:
        """Take steps; tokens per CPU-second and per wall second."""
        for pipe in self.pipes:
            pipe.send(steps)
        cpu, wall = zip(*(pipe.recv() for pipe in self.pipes), strict=True)
        tokens = steps * self.case.tokens
        return tokens / sum(cpu), tokens / max(wall)

    def end(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(None)
            process.join()


def _spread(values: tuple[float, ...], digits: int) -> str:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _row(pairs: list[tuple[float, float]], digits: int) -> str:
    cpu, wall = zip(*pairs, strict=True)
    return f"{_spread(cpu, digits):21} | {_spread(wall, digits)}"


def measure(case: Case, names: list[str], rounds: int, steps: int) -> dict[str, list[tuple[float, float]]]:
    """Candidate -> (tokens per CPU-second, tokens per second) of every round, after one round to warm up."""
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        jobs = {name: Job(name, case, folder) for name in names}
        for number in range(-1, rounds):
            # nobody is always first
            for name in names[number % len(names) :] + names[: number % len(names)]:
                rates = jobs[name].take(steps)
                if number >= 0:
                    results[name].append(rates)
        for job in jobs.values():
            job.end()
    return results


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="windtunnel-30m")
    parser.add_argument("--vocab-size", type=int, default=8192, help="of quickstart's tokenizer unless given")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--micro-batch", type=int, default=2, help="samples of one rank")
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches of a step")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="of one turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    arguments = vars(parser.parse_args())
    rounds, steps, names = (arguments.pop(key) for key in ("rounds", "steps", "candidates"))
    case = Case(**arguments)
    print(" ".join(f"{key}={value}" for key, value in arguments.items()), f"tokens/step={case.tokens}")
    print(" ".join(f"{package}={importlib.metadata.version(package)}" for package in PACKAGES), flush=True)
    results = measure(case, names, rounds, steps)
    print(f"{'':13} | tokens per CPU-second | tokens per second     (median, quartiles)")
    for name, rates in results.items():
        print(f"{name:13} | {_row(rates, 0)}")
    for name in names[1:]:
        ratios = [
            (first_cpu / cpu, first_wall / wall)
            for (first_cpu, first_wall), (cpu, wall) in zip(results[names[0]], results[name], strict=True)
        ]
        print(f"{names[0]} / {name:5} | {_row(ratios, 3)}")


if __name__ == "__main__":
    main()
