"""Muon: its iteration against the singular values, one step against a reference by hand, resume, and its options."""

from __future__ import annotations

import math
from typing import Any

import deepspeed  # noqa: F401  (forks should find it imported)
import pytest
import torch
from megatron.core import parallel_state
from torch.utils.flop_counter import FlopCounterMode

from minicpm_megatron.engine.muon import Muon, newton_schulz
from minicpm_megatron.engine.optimizers.muon import newton_schulz_flops
from minicpm_megatron.engine.state import EngineState
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import OptimizerRecipe, build, load_recipe, recipe_hash
from minicpm_megatron.recipe.dump import dump_recipe
from minicpm_megatron.recipe.memory import estimate_memory
from minicpm_megatron.storage.sharded import WEIGHT
from tests.device import deterministic, put
from tests.distributed.forked import run_forked
from tests.engine.test_engine import BASE, DECAY, LR, _engine
from tests.engine.test_optimizers import Gathered
from tests.recipe.fields import minimal_fields

STEPS, CUT = 4, 2
# of a step: minicpm-nano's shape
WIDTH, HEADS, GROUPS, CHANNELS = 64, 4, 2, 16


def polynomial(value: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """What the iteration does to a singular value."""
    for _ in range(steps):
        value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5
    return value


def reference(matrix: torch.Tensor) -> torch.Tensor:
    """The update of a matrix in fp64, by its singular values."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left @ torch.diag(polynomial(values / values.square().sum().sqrt())) @ right


@pytest.mark.parametrize("shape", [(48, 48), (80, 32), (32, 80), (1, 16)])
def test_newton_schulz_maps_singular_values_by_the_polynomial(shape: tuple[int, int]) -> None:
    matrix = put(torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 1e-6)
    found = newton_schulz(matrix, 5)
    assert torch.allclose(found.double(), reference(matrix), atol=2e-5)
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    if shape != (48, 48):  # a square random matrix has singular values near 0, which five steps do not bring to 1
        assert float((torch.linalg.svdvals(found) - 0.9).abs().max()) < 0.25  # the band of Jordan et al.
        assert float((found - left @ right).norm() / (left @ right).norm()) < 0.33  # 1 - 0.68


@pytest.mark.parametrize(("rows", "columns"), [(48, 80), (80, 48), (64, 64)])
def test_its_products_are_those_that_the_plan_counts(rows: int, columns: int) -> None:
    with FlopCounterMode(display=False) as counted:
        newton_schulz(torch.ones(rows, columns), 3)
    section = OptimizerRecipe(name="muon", options={"ns_steps": 3})
    assert newton_schulz_flops(rows, columns, section) == counted.get_total_flops()


def test_newton_schulz_of_nothing_is_nothing() -> None:
    assert newton_schulz(torch.zeros(4, 8), 5).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_newton_schulz_does_not_depend_on_the_size_of_its_matrix(dtype: torch.dtype) -> None:
    """Down to where a momentum without gradients has all but died away: squares of 1e-24 are no fp32 numbers."""
    matrix = torch.randn(32, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    expected = newton_schulz(matrix, 5).float()
    for size in (1e30, 1e-8, 1e-19, 1e-24, 1e-30, 1e-36):
        found = newton_schulz(matrix * size, 5).float()
        assert torch.allclose(found, expected, atol=1e-5 if dtype == torch.float32 else 0.2), size
    assert newton_schulz(matrix * 1e-44, 5).float().isfinite().all()


def test_a_matrix_without_gradients_stays_finite() -> None:
    """An expert to which no token came for a thousand steps."""
    weight = torch.nn.Parameter(torch.zeros(16, 32))
    optimizer = of_one(weight, update_norm=1.0)
    for step in range(1000):
        weight.grad = torch.randn(16, 32) * 1e-4 if step < 5 else torch.zeros(16, 32)
        optimizer.step()
    assert weight.isfinite().all()


def test_a_group_without_its_scale_is_refused() -> None:
    with pytest.raises(UserError, match="group 'hidden' has no update_norm"):
        of_one(torch.nn.Parameter(torch.ones(4, 4)))


def of_one(weight: torch.nn.Parameter, **group: Any) -> Muon:
    """The optimizer of one hidden matrix."""
    groups = [{"name": "hidden", "params": [weight], "lr": 1e-3, "weight_decay": 0.0, **group}]
    keys: dict[str, Any] = {"momentum": 0.9, "nesterov": True, "ns_steps": 5, "update_rms": 0.2}
    return Muon(groups, ["hidden"], lr=0.1, betas=(0.9, 0.95), eps=1e-8, **keys)


def test_a_vector_is_not_taken_for_a_matrix() -> None:
    optimizer = of_one(torch.nn.Parameter(torch.ones(16)), update_norm=1.0)
    with pytest.raises(RuntimeError, match="set `matrices` before stepping"):
        optimizer.step()


def separate(name: str, whole: torch.Tensor) -> list[list[int]]:
    """Rows of the matrices in a weight, counted head by head."""
    if name.endswith("linear_fc1.weight"):
        half = whole.size(0) // 2
        return [list(range(half)), list(range(half, 2 * half))]
    if not name.endswith("linear_qkv.weight"):
        return [list(range(whole.size(0)))]
    rows: list[list[int]] = [[], [], []]
    row = 0
    for _ in range(GROUPS):
        for kind in [0] * (HEADS // GROUPS) + [1, 2]:
            rows[kind] += range(row, row + CHANNELS)
            row += CHANNELS
    return rows


def batches(steps: int, world: int = 2) -> list[list[Any]]:
    """[step][micro-batch of the world] -> tokens and labels [2, 8]."""
    tokens = torch.randint(64, (steps, world, 2, 9), generator=torch.Generator().manual_seed(4))
    return [[(put(rows[:, :-1].contiguous()), put(rows[:, 1:].contiguous())) for rows in step] for step in tokens]


def go(engine: Any, steps: list[list[Any]]) -> list[float]:
    """Train on this rank's part of each step."""
    engine.train()
    norms = []
    for step in steps:
        mine = step[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]
        engine.accumulate(mine, len(mine))
        update = engine.step()
        assert update.applied
        norms.append(update.gradient_norm)
    return norms


def compare_with_hand(rank: int, case: dict[str, Any]) -> dict[str, float]:
    """Largest relative distance of each weight's change in two steps from that of the reference.

    Hidden matrices have the formula's, all else torch's AdamW's.
    """
    deterministic()
    engine = _engine(case)
    apart: dict[str, float] = {}
    momentum: dict[str, torch.Tensor] = {}
    others: dict[str, tuple[torch.nn.Parameter, torch.optim.AdamW]] = {}
    nesterov = case.get("options", {}).get("nesterov", True)
    for step in batches(2, 1):
        before = Gathered(engine).tensors
        engine.train()
        engine.accumulate(step, 1)
        limit, norm = engine.recipe.training.gradient_clipping, engine.gradient_norm()
        gradients = {
            name: min(1.0, limit / norm)
            * torch.cat([engine.zero.gradient(parameter, piece) for piece in engine.zero.pieces(parameter)])
            .double()
            .clone()
            for parameter, name in engine.names.items()
        }
        assert engine.step().gradient_norm < 1e9
        after = Gathered(engine).tensors
        for name, gradient in gradients.items():
            weight = before[name, WEIGHT].double()
            gradient = gradient[: weight.numel()].view_as(weight)  # Megatron-Core pads the vocabulary
            if name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")):
                momentum[name] = 0.95 * momentum.get(name, torch.zeros_like(weight)) + 0.05 * gradient
                direction = 0.95 * momentum[name] + 0.05 * gradient if nesterov else momentum[name]
                expected = weight * (1 - LR * DECAY)
                for rows in separate(name, weight):
                    part = direction[rows]
                    scale = LR * 0.2 * math.sqrt(BASE) * math.sqrt(part.size(0) / part.size(1))
                    expected[rows] -= scale * reference(part)
            else:
                if name not in others:
                    copy = torch.nn.Parameter(weight.clone())
                    others[name] = copy, torch.optim.AdamW([copy], LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
                copy, adamw = others[name]
                copy.grad = gradient
                adamw.step()
                expected = copy.detach().clone()
            moved = (expected - weight).norm()
            apart[name] = max(apart.get(name, 0.0), float((after[name, WEIGHT].double() - expected).norm() / moved))
    return apart


@pytest.mark.parametrize("options", [{}, {"nesterov": False}], ids=["nesterov", "plain"])
def test_two_steps_are_those_of_the_formula(options: dict[str, Any]) -> None:
    (rank,) = run_forked(
        "tests.engine.test_muon:compare_with_hand",
        [{"stage": 0, "precision": "fp32", "optimizer": "muon", "options": options, "ranks": 1}],
    )[0]
    assert rank.status == 0, rank.log
    # four matrices and two norms in each of two layers, the embedding and the last norm
    assert len(rank.result) == 14
    assert max(rank.result.values()) < 1e-3, rank.result


def resume(rank: int, case: dict[str, Any]) -> dict[str, Any]:
    """Four updates in one go, and the last two by an engine of another layout that loads the state after the second."""
    deterministic()
    steps = batches(STEPS)
    whole = _engine(case["from"])
    go(whole, steps[:CUT])
    kept = Gathered(whole)
    go(whole, steps[CUT:])
    end = Gathered(whole).tensors
    if case["to"].get("tp", 1) != case["from"].get("tp", 1):
        parallel_state.destroy_model_parallel()
    resumed = _engine(case["to"])
    EngineState(resumed).load(kept, CUT)
    go(resumed, steps[CUT:])
    again = Gathered(resumed).tensors
    return {
        "same": end.keys() == again.keys() and all(torch.equal(end[key], again[key]) for key in end),
        "apart": max(float((end[key] - again[key]).norm() / end[key].norm()) for key in end if key[1] == WEIGHT),
        "kinds": {name: sorted(kind for each, kind in kept.tensors if each == name) for name, _ in kept.tensors},
    }


def layout(stage: int, precision: str = "fp32", tp: int = 1) -> dict[str, Any]:
    return {"stage": stage, "precision": precision, "optimizer": "muon", "tp": tp}


SAME = {"ZeRO 0": layout(0), "ZeRO 1 bf16": layout(1, "bf16"), "ZeRO 3": layout(3), "TP 2": layout(1, tp=2)}
OTHER = {"ZeRO 0 to 3": (layout(0), layout(3)), "ZeRO 2 to TP 2": (layout(2), layout(0, tp=2))}


def test_a_resumed_run_is_the_same_run() -> None:
    pairs = {name: (case, case) for name, case in SAME.items()} | OTHER
    outcomes = run_forked("tests.engine.test_muon:resume", [{"from": a, "to": b} for a, b in pairs.values()])
    for name, outcome in zip(pairs, outcomes, strict=True):
        for rank in outcome:
            assert rank.status == 0, (name, rank.log)
            assert rank.result["same"] or name not in SAME, name
            assert rank.result["apart"] < 1e-6, (name, rank.result["apart"])
            for weight, kinds in rank.result["kinds"].items():
                muon = "linear_" in weight and "layernorm" not in weight
                assert kinds == (["momentum_buffer", "param"] if muon else ["exp_avg", "exp_avg_sq", "param"]), weight


def test_options_are_typed_written_out_and_part_of_the_run() -> None:
    adam, muon = (build(minimal_fields(optimizer={"name": name})) for name in ("adamw", "muon"))
    assert muon.optimizer.options == {"momentum": 0.95, "nesterov": True, "ns_steps": 5, "update_rms": 0.2}
    slower = build(minimal_fields(optimizer={"name": "muon", "options": {"ns_steps": 6}}))
    assert len({recipe_hash(recipe) for recipe in (adam, muon, slower)}) == 3
    assert recipe_hash(adam) == recipe_hash(build(minimal_fields()))
    with pytest.raises(
        UserError, match=r"optimizer.options.ns_steps: 0 is refused, it must be greater than or equal to 1"
    ):
        build(minimal_fields(optimizer={"name": "muon", "options": {"ns_steps": 0}}))
    with pytest.raises(UserError, match=r"unknown key optimizer.options.momentum"):
        build(minimal_fields(optimizer={"options": {"momentum": 0.9}}))


def test_a_dumped_recipe_is_read_back(tmp_path: Any) -> None:
    recipe = build(minimal_fields(optimizer={"name": "muon", "options": {"nesterov": False}}))
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path).optimizer == recipe.optimizer


def test_the_plan_counts_one_moment_of_hidden_matrices_and_two_of_others() -> None:
    fields = {"deepspeed": {"zero_stage": 1}}
    adam, muon = (build(minimal_fields(optimizer={"name": name}, **fields)) for name in ("adamw", "muon"))
    state = [estimate_memory(recipe, recipe.check_world_size(2)).optimizer for recipe in (adam, muon)]
    model = adam.model
    attention = 2 * model.hidden_size * (model.num_attention_heads + model.num_query_groups) * model.kv_channels
    hidden = model.num_layers * (attention + 3 * model.hidden_size * model.ffn_hidden_size)
    assert state[0] - state[1] == pytest.approx(4 * hidden / 2, abs=2)
