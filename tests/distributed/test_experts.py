"""A mixture of experts is one run, too: every layout gives the losses, gradient norms and loads of one process.

The auxiliary losses are made to weigh a hundred times what they do by default, so that one that were counted twice, or
divided by a number of ranks, could not hide.
"""

from __future__ import annotations

import pytest

from tests.distributed.parity import DIGITS, agreement, furthest, run_layouts

MODEL = {"num_moe_experts": 4, "moe_aux_loss_coeff": 1.0, "moe_z_loss_coeff": 0.1}
ALONE = {
    "accumulation 4": {"micro": 2},
    "recompute full": {"recompute": "full"},
    "ZeRO 1": {"zero": 1},
}
TWO = {
    "DP2": {},
    "EP2": {"ep": 2},
    "EP2 ZeRO 1": {"ep": 2, "zero": 1},
    "EP2 ZeRO 2 accumulation 2": {"ep": 2, "zero": 2, "micro": 2},
    "EP2 ZeRO 1 recompute": {"ep": 2, "zero": 1, "recompute": "full"},
    "ZeRO 3": {"zero": 3},
    "TP2 SP": {"tp": 2, "sp": True},
    "CP2 ring": {"cp": 2},
    "CP2 Ulysses ZeRO 3": {"cp": 2, "kind": "a2a", "zero": 3},
    "CP2 ring EP2 ZeRO 1": {"cp": 2, "ep": 2, "zero": 1},
    "PP2 ZeRO 1": {"pp": 2, "zero": 1, "micro": 2},
}
FOUR = {
    "EP2 DP4 ZeRO 1": {"ep": 2, "zero": 1},
    "EP4 ZeRO 2": {"ep": 4, "zero": 2},
    "EP2 DP4 ZeRO 0": {"ep": 2},
    "TP2 SP EP2 ZeRO 0": {"tp": 2, "sp": True, "ep": 2},
    "TP2 SP EP2 ZeRO 1": {"tp": 2, "sp": True, "ep": 2, "zero": 1},
    "TP2 SP EP2 ZeRO 2 recompute": {"tp": 2, "sp": True, "ep": 2, "zero": 2, "recompute": "full"},
    "PP2 EP2 ZeRO 1": {"pp": 2, "ep": 2, "zero": 1, "micro": 2},
    "CP2 Ulysses DP2 EP4 ZeRO 1": {"cp": 2, "kind": "a2a", "ep": 4, "zero": 1},
}
BF16 = {
    **{f"EP2 ZeRO {stage}": {"ep": 2, "zero": stage, "precision": "bf16"} for stage in range(3)},
    "TP2 SP ZeRO 1": {"tp": 2, "sp": True, "zero": 1, "precision": "bf16"},
    "PP2 ZeRO 1": {"pp": 2, "zero": 1, "micro": 2, "precision": "bf16"},
}

# experts over both: DeepSpeed's norm must be told of the tensor-parallel parts
BF16_FOUR = {"TP2 SP EP2 ZeRO 1": {"tp": 2, "sp": True, "ep": 2, "zero": 1, "precision": "bf16"}}


@pytest.fixture(scope="module")
def reference():
    return run_layouts(1, {"1 process": {}}, model=MODEL)["1 process"]


@pytest.mark.parametrize(("world", "layouts"), [(1, ALONE), (2, TWO), (4, FOUR)], ids=["1 rank", "2 ranks", "4 ranks"])
def test_every_layout_gives_the_same_run(reference, world, layouts):
    runs = run_layouts(world, layouts, model=MODEL)
    table = {name: agreement(reference.lines, run.lines) for name, run in runs.items()}
    for name, value in table.items():
        print(f"{name:28} loss, gradient norm {runs[name].lines[-1]}  {value:.1f} digits")
    assert reference.lines[-1][0] < reference.lines[0][0] - 0.5
    assert all(value >= DIGITS for value in table.values()), table
    for name, run in runs.items():
        assert len(run.loads) == len(reference.loads) == 2
        for layer, whole in zip(run.loads, reference.loads, strict=True):
            assert layer["layer"] == whole["layer"]
            assert sum(layer["share"]) == pytest.approx(1)
            # rounding decides between two experts for a few of 5,120 tokens
            assert layer["share"] == pytest.approx(whole["share"], abs=2e-3), name
            assert layer["dropped"] == 0
            for key in ("router_entropy", "load_balancing_loss"):
                assert layer[key] == pytest.approx(whole[key], rel=1e-4), (name, key)


def test_the_auxiliary_losses_are_seen_in_these_numbers(reference):
    half = run_layouts(1, {"half": {}}, model=MODEL | {"moe_aux_loss_coeff": 0.5})["half"]
    none = run_layouts(1, {"none": {}}, model=MODEL | {"moe_z_loss_coeff": 0.0})["none"]
    assert agreement(reference.lines, half.lines) < 3
    assert agreement(reference.lines, none.lines) < 3


def test_balance_over_micro_batches_is_the_same_where_they_are(reference):
    """aux_loss balances what one data-parallel rank has at once: the same where that is the same."""
    model = MODEL | {"moe_router_load_balancing_type": "aux_loss"}
    whole = run_layouts(1, {"one": {"micro": 4}, "other": {"micro": 8}}, model=model)
    layouts = {
        "EP2 ZeRO 1": {"ep": 2, "zero": 1},
        "TP2 SP": {"tp": 2, "sp": True, "micro": 4},
        "CP2": {"cp": 2, "micro": 4},
    }
    for name, run in run_layouts(2, layouts, model=model).items():
        assert agreement(whole["one"].lines, run.lines) >= DIGITS, name
    assert agreement(whole["one"].lines, whole["other"].lines) < 4


def test_bf16_stays_close_to_fp32(reference):
    for name, run in (run_layouts(2, BF16, model=MODEL) | run_layouts(4, BF16_FOUR, model=MODEL)).items():
        apart = furthest(reference.lines, run.lines)
        print(f"{name}: losses within {apart.loss:.1e} of fp32, gradient norms within {apart.norm:.1e}")
        assert apart.as_bf16_may_be, name
