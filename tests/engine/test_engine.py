"""Learning rates, decay and schedulers under DeepSpeed: real engines, two ranks (on a GPU one), every stage."""

from __future__ import annotations

import itertools
from typing import Any

import deepspeed  # forks should find it imported
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from minicpm_megatron.engine import patches
from minicpm_megatron.engine.engine import Engine
from minicpm_megatron.engine.state import EngineState
from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.mup import mup_param_groups
from minicpm_megatron.methods.torch_schedulers import WSDScheduler
from minicpm_megatron.model.config import MiniCPMConfig
from minicpm_megatron.model.initialize import initialize_parameters
from minicpm_megatron.model.model import MiniCPMModel
from minicpm_megatron.parallel import groups
from minicpm_megatron.recipe import build
from minicpm_megatron.recipe.presets import get_preset
from minicpm_megatron.storage.sharded import ShardSpec
from tests.device import put, ranks
from tests.distributed.forked import Outcome, run_forked

LR, DECAY, BASE = 0.01, 0.1, 64
FACTORS = [1.0, 0.5, 0.25]
KINDS = {"hidden": "decoder.layers.0.mlp.linear_fc1.weight", "embedding": "embedding.word_embeddings.weight"}
KINDS |= {"vector": "decoder.final_layernorm.weight"}
SHAPE = MiniCPMConfig(num_layers=1, hidden_size=64, num_attention_heads=1, dim_model_base=16)
CURVE = {"warmup": 4, "total": 10, "decay": 3, "decay_shape": "linear"}
SIZES = [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 2.0, 2.0, 2.0, 2.0]  # tokens of each update
COMBINATIONS = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]


def _engine(case: dict[str, Any], **keywords: Any) -> Engine:
    """An engine of a nano model; `keywords` go to its constructor."""
    recipe = build(
        {
            "name": "engine",
            "preset": "minicpm-nano",
            "model": {"vocab_size": 64, "dim_model_base": BASE},
            "data": {"train": [{"prefix": "unused"}], "sequence_length": 8},
            "parallel": {"tensor_model_parallel_size": case.get("tp", 1)},
            "training": {
                "global_batch_size": 2 * dist.get_world_size(),
                "micro_batch_size": 2,
                "precision": case["precision"],
            },
            "optimizer": {
                "name": case.get("optimizer", "adamw"),
                "lr": LR,
                "weight_decay": DECAY,
                "weight_decay_mode": case.get("mode", "tied"),
                "options": case.get("options", {}),
            },
            "schedule": {"shape": "constant", "total": 10},
            "deepspeed": {"zero_stage": case["stage"], "config": case.get("config")},
        }
    )
    layout = recipe.check_world_size(dist.get_world_size())
    if not parallel_state.model_parallel_is_initialized():
        groups.initialize(layout)
    config = MiniCPMConfig.from_recipe(recipe.model, recipe.parallel, precision=case["precision"], recompute="none")
    model = MiniCPMModel(config)
    initialize_parameters(model, config, seed=1)
    return Engine(model, config, recipe, layout, **keywords)


def _masters(engine: Engine) -> dict[str, torch.Tensor]:
    """Master weights of the tensors in KINDS, whole, gathered over the ranks."""
    found = {}
    for role, name in KINDS.items():
        parts = [
            (fragment.start, fragment.tensor.clone().cpu())
            for fragment in EngineState(engine).fragments()
            if fragment.spec.name == name and fragment.kind == "param"
        ]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, parts)
        found[role] = torch.cat([tensor for _, tensor in sorted(sum(everyone, []), key=lambda part: part[0])])
    return found


def shrink(rank: int, case: dict[str, Any]) -> list[dict[str, float]]:
    """Updates without gradient: by what share the weights of each role shrink, per update of FACTORS."""
    engine = _engine(case)
    engine.train()
    tokens = put(torch.arange(16).view(2, 8))
    lines, before = [], _masters(engine)
    for factor in FACTORS:
        engine.set_rates(factor)
        engine.backward(engine.losses(tokens, tokens).mean() * 0.0)
        assert engine.step().applied
        after = _masters(engine)
        # the whole tensor must shrink alike: a mean would hide a part that does not
        ratios = {role: (after[role] / before[role])[before[role].abs() > 1e-3] for role in KINDS}
        for role, ratio in ratios.items():
            assert float(ratio.max() - ratio.min()) < 1e-5, role
        lines.append({role: 1.0 - float(ratio.double().mean()) for role, ratio in ratios.items()})
        before = after
    return lines


class Zeros:
    """A checkpoint whose tensors are all zero."""

    def read_shard(self, spec: ShardSpec, kind: str, padded_shape: tuple[int, ...] | None) -> torch.Tensor:
        """One shard."""
        assert padded_shape is not None
        return put(torch.zeros(padded_shape))


def tamper(rank: int, case: dict[str, Any]) -> dict[str, Any]:
    """What the engine says to rates that something else has set, group by group, and what it tells while it loads."""
    engine = _engine(case)
    said, heard = [], []
    EngineState(engine).load(Zeros(), 1, heard.append)
    assert all(not fragment.tensor.any() for fragment in EngineState(engine).fragments())
    for group in engine.param_groups:
        for field in ("lr", "lr_multiplier"):
            kept = group[field]
            group[field] = kept * 1.5
            try:
                engine.check_rates(1.0)
                said.append("accepted")
            except UserError as error:
                said.append(str(error))
            group[field] = kept
    engine.check_rates(1.0)
    return {"said": said, "heard": heard, "names": list(engine.names.values())}


class Two(torch.nn.Module):
    """A hidden matrix and a vector, under names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(4, 4))
        self.b = torch.nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.w + self.b).square().mean()


def schedule(rank: int, case: dict[str, Any]) -> dict[str, list[list[float]]]:
    """Rates of both groups before every update, under DeepSpeed's engine, whole and cut after the fifth."""

    patches.prepare()

    def start() -> Any:
        model = put(Two())
        optimizer = torch.optim.AdamW(
            mup_param_groups(model, SHAPE, lr=LR, role=lambda name, dimensions: {"w": "hidden", "b": "vector"}[name])
        )
        config = {"train_batch_size": 4, "zero_optimization": {"stage": case["stage"]}}
        scheduler = WSDScheduler(optimizer, **CURVE, **case["keywords"])
        return deepspeed.initialize(
            model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config, dist_init_required=False
        )[0]

    def go(engine: Any, steps: range) -> list[list[float]]:
        rates = []
        for step in steps:
            rates.append([group["lr"] for group in engine.optimizer.param_groups])
            engine.backward(engine(put(torch.ones(2, 4))))
            tokens = {"tokens": case["tokens"][step + 1]} if "tokens" in case else {}
            engine.step(lr_kwargs=tokens)
        return rates

    whole = go(start(), range(10))
    first = start()
    cut = go(first, range(5))
    first.save_checkpoint(case["folder"], tag="five")
    second = start()
    second.load_checkpoint(case["folder"], tag="five")
    return {"whole": whole, "cut": cut + go(second, range(5, 10))}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    found = {}
    shrinks = [
        {"stage": stage, "precision": precision, "mode": mode}
        for stage, precision in COMBINATIONS
        for mode in ("tied", "independent")
    ]
    tampers = [{"stage": stage, "precision": "fp32"} for stage in range(4)]
    folder = tmp_path_factory.mktemp("deepspeed")
    tokens = {"keywords": {"unit": "tokens", "tokens_per_step": SIZES[0]}, "tokens": SIZES}
    schedules = [
        {"stage": stage, "keywords": {}}
        | (tokens if unit == "tokens" else {})
        | {"mode": unit, "folder": str(folder / f"{stage}-{unit}")}
        for stage in range(3)
        for unit in ("steps", "tokens")
    ]
    for target, cases in (("shrink", shrinks), ("tamper", tampers), ("schedule", schedules)):
        cases = [case | {"ranks": ranks(2)} for case in cases]
        for case, outcome in zip(cases, run_forked(f"tests.engine.test_engine:{target}", cases), strict=True):
            assert [rank.status for rank in outcome] == [0] * ranks(2), "".join(rank.log for rank in outcome)
            found["-".join([target, *(str(case.get(key, "")) for key in ("stage", "precision", "mode"))])] = outcome
    return found


@pytest.mark.parametrize("mode", ["tied", "independent"])
@pytest.mark.parametrize(("stage", "precision"), COMBINATIONS)
def test_weight_decay_is_tied_to_the_rate_or_independent_of_it(
    stage: int, precision: str, mode: str, jobs: dict[str, list[Outcome]]
) -> None:
    rate = LR * BASE / get_preset("minicpm-nano").hidden_size  # the hidden group's
    for factor, line in zip(FACTORS, jobs[f"shrink-{stage}-{precision}-{mode}"][0].result, strict=True):
        wanted = DECAY * factor * (rate if mode == "tied" else 1.0)
        assert line["hidden"] == pytest.approx(wanted, rel=1e-3)
        assert line["embedding"] == line["vector"] == 0.0


@pytest.mark.parametrize("stage", range(4))
def test_a_rate_that_something_else_set_is_refused_and_the_group_named(
    stage: int, jobs: dict[str, list[Outcome]]
) -> None:
    for rank in jobs[f"tamper-{stage}-fp32-"]:
        names = [name for name in ("embedding", "hidden", "vector") for _ in ("lr", "lr_multiplier")]
        assert len(rank.result["said"]) == len(names)
        for name, said in zip(names, rank.result["said"], strict=True):
            assert said.startswith(f"learning rates: group '{name}' has rate")


@pytest.mark.parametrize("stage", range(4))
def test_a_long_load_is_no_silence(stage: int, jobs: dict[str, list[Outcome]]) -> None:
    """The watchdog hears of every parameter: a rank may read for longer than it may be silent."""
    for rank in jobs[f"tamper-{stage}-fp32-"]:
        assert len(rank.result["heard"]) > 10 and rank.result["heard"] == rank.result["names"]


@pytest.mark.parametrize("unit", ["steps", "tokens"])
@pytest.mark.parametrize("stage", range(3))
def test_a_scheduler_under_deepspeed_keeps_the_ratios_and_goes_on_where_it_stopped(
    stage: int, unit: str, jobs: dict[str, list[Outcome]]
) -> None:
    ends = list(range(1, 11)) if unit == "steps" else list(itertools.accumulate(SIZES))[:10]
    # warmup over 4, full until 7, then linear to a tenth at 10
    factors = [end / 4 if end < 4 else 1.0 if end <= 7 else 1 - 0.9 * min(end - 7, 3) / 3 for end in ends]
    for rank in jobs[f"schedule-{stage}--{unit}"]:
        assert rank.result["whole"] == rank.result["cut"]
        for factor, rates in zip(factors, rank.result["whole"], strict=True):
            assert rates == pytest.approx([LR / 4 * factor, LR * factor], rel=1e-12)
