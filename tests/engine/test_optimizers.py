"""Registered optimizers: what they say of their state is so, and one of another package trains, saves and resumes."""

from __future__ import annotations

from typing import Any

import deepspeed  # noqa: F401  (forks should find it imported)
import pytest
import torch
import torch.distributed as dist

from minicpm_megatron.engine.state import EngineState
from minicpm_megatron.methods.mup import ROLES
from minicpm_megatron.recipe import OptimizerRecipe, build, recipe_hash
from minicpm_megatron.recipe.memory import estimate_memory, offloaded_bytes
from minicpm_megatron.recipe.optimizer import Optimizer, as_optimizer
from minicpm_megatron.registry import OPTIMIZERS
from minicpm_megatron.storage.sharded import WEIGHT, ShardSpec
from tests.device import deterministic, put, ranks
from tests.distributed.forked import Outcome, run_forked
from tests.engine.test_engine import LR, _engine
from tests.recipe.fields import minimal_fields

CASES = [(0, "bf16"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32")]
STEPS, CUT = 4, 2


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_the_state_is_as_declared(name: str) -> None:
    entry = OPTIMIZERS.get(name)
    parameters = {role: torch.nn.Parameter(torch.ones(4, 4)) for role in ROLES}
    groups = [
        {"name": role, "params": [parameter], "lr": 0.5, "weight_decay": 0.0, "update_norm": 1.0}
        for role, parameter in parameters.items()
    ]
    optimizer = entry.build(groups, OptimizerRecipe(name=name), False)
    for parameter in parameters.values():
        parameter.grad = torch.eye(4)
    optimizer.step()
    for role, parameter in parameters.items():
        state = dict(optimizer.state[parameter])
        assert int(state.pop("step")) == 1
        assert set(state) == set(entry.moments_for(role))
        assert all(each.dtype == torch.float32 and each.numel() == 16 for each in state.values())
        assert not torch.equal(parameter.detach(), torch.ones(4, 4))


def test_another_name_is_another_run_and_an_unknown_one_is_refused() -> None:
    assert recipe_hash(build(minimal_fields(optimizer={"name": "adamw"}))) == recipe_hash(build(minimal_fields()))
    with pytest.raises(Exception, match="optimizer.name: unknown optimizer 'adamv'; did you mean adamw"):
        build(minimal_fields(optimizer={"name": "adamv"}))


def test_the_plan_counts_what_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = build(minimal_fields(deepspeed={"zero_stage": 1}))
    layout = recipe.check_world_size(2)
    adam = estimate_memory(recipe, layout).optimizer
    offloading = build(minimal_fields(deepspeed={"zero_stage": 1, "offload_optimizer": "cpu"}))
    host = offloaded_bytes(offloading, layout)
    one = Optimizer(build=lambda groups, recipe, on_host: None, moments=("momentum_buffer",))
    monkeypatch.setattr(OPTIMIZERS, "get", lambda name: one)
    # a master, a gradient on the host, and one moment instead of two
    assert estimate_memory(recipe, layout).optimizer == pytest.approx(adam * 8 / 12, abs=1)
    assert offloaded_bytes(offloading, layout) == pytest.approx(host * 12 / 16, abs=1)


@pytest.mark.parametrize("entry", [object(), Optimizer(build=None, moments=()), Optimizer(build=print, moments="m")])
def test_what_is_no_optimizer_is_refused(entry: Any) -> None:
    with pytest.raises(TypeError):
        as_optimizer(entry)


class Signs(torch.optim.Optimizer):
    """Steps by the sign of a momentum; keeps a second tensor of all but the hidden matrices."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    for kind in SIGNS.moments_for(group["name"]):
                        state[kind] = torch.zeros_like(parameter)
                state["step"] += 1
                state["velocity"].lerp_(parameter.grad, 0.5)
                if "distance" in state:
                    state["distance"].add_(parameter.grad.abs())
                parameter.add_(state["velocity"].sign(), alpha=-group["lr"])


SIGNS = Optimizer(
    build=lambda groups, recipe, on_host: Signs(groups),
    moments=("velocity", "distance"),
    moments_of={"hidden": ("velocity",)},
)


class Gathered:
    """Fragments of all ranks as a checkpoint that any layout reads."""

    def __init__(self, engine: Any) -> None:
        mine = [
            (fragment.spec, fragment.kind, fragment.start, fragment.valid.clone())
            for fragment in EngineState(engine).fragments()
        ]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        shards: dict[tuple[str, ShardSpec], torch.Tensor] = {}
        for spec, kind, start, tensor in sum(everyone, []):
            shard = shards.setdefault((kind, spec), torch.full(spec.shape, torch.nan))
            shard.view(-1)[start : start + tensor.numel()] = tensor
        self.tensors: dict[tuple[str, str], torch.Tensor] = {}
        for (kind, spec), shard in shards.items():
            spec.put(self.tensors.setdefault((spec.name, kind), torch.full(spec.global_shape, torch.nan)), shard)

    def read_shard(self, spec: ShardSpec, kind: str, padded_shape: tuple[int, ...] | None) -> torch.Tensor:
        """One shard."""
        return put(spec.take(self.tensors[spec.name, kind], padded_shape))


def train(rank: int, case: dict[str, Any]) -> dict[str, Any]:
    """Four updates in one go, and the last two of them by an engine that has loaded the state after the second."""
    deterministic()
    OPTIMIZERS.add("signs", SIGNS)
    batches = [
        [(put(tokens[:, :-1].contiguous()), put(tokens[:, 1:].contiguous()))]
        for tokens in torch.randint(64, (STEPS, 2, 9), generator=torch.Generator().manual_seed(rank))
    ]

    def go(engine: Any, steps: range) -> list[Any]:
        engine.train()
        said = []
        for step in steps:
            said.append(float(engine.accumulate(batches[step], 1)))
            assert engine.step().applied
        return said

    whole = _engine(case)
    before = Gathered(whole)
    said = go(whole, range(1))
    first = Gathered(whole)
    said += go(whole, range(1, CUT))
    kept = Gathered(whole)
    said += go(whole, range(CUT, STEPS))
    resumed = _engine(case)
    EngineState(resumed).load(kept, CUT)
    again = go(resumed, range(CUT, STEPS))
    ends = [Gathered(whole).tensors, Gathered(resumed).tensors]
    norm = "decoder.final_layernorm.weight"  # which nothing decays
    return {
        "said": said[CUT:] == again,
        "same": ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0]),
        "kinds": {name: sorted(kind for each, kind in kept.tensors if each == name) for name, _ in kept.tensors},
        "moved": (first.tensors[norm, WEIGHT] - before.tensors[norm, WEIGHT]).abs().unique().tolist(),
        "updates": EngineState(resumed).updates(),
    }


@pytest.fixture(scope="module")
def trained() -> list[list[Outcome]]:
    cases = [
        {"stage": stage, "precision": precision, "optimizer": "signs", "ranks": ranks(2)} for stage, precision in CASES
    ]
    return run_forked("tests.engine.test_optimizers:train", cases)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"ZeRO {stage} {precision}" for stage, precision in CASES])
def test_one_of_another_package_trains_and_resumes_at_every_stage(number: int, trained: list[list[Outcome]]) -> None:
    outcome = trained[number]
    assert [rank.status for rank in outcome] == [0] * ranks(2), "".join(rank.log for rank in outcome)
    for rank in outcome:
        found = rank.result
        assert found["said"] and found["same"] and found["updates"] == STEPS
        # its own rule made the update: the base rate, and nothing else
        assert found["moved"] == pytest.approx([LR] * len(found["moved"]), rel=1e-4)
        for name, kinds in found["kinds"].items():
            vector = name.endswith("layernorm.weight") or "embedding" in name
            assert kinds == (["distance", "param", "velocity"] if vector else ["param", "velocity"]), name
