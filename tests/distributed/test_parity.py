"""One run, any layout: the same losses and gradient norms to 5 digits over 20 steps.

A choice of layouts; `python -m tests.distributed.matrix` runs them all.
"""

from __future__ import annotations

import pytest

from tests.distributed.parity import DIGITS, SEQUENCE, agreement, furthest, run_layouts

ALONE = {
    "1 process": {},
    "accumulation 4": {"micro": 2},
    "recompute full": {"recompute": "full"},
    "recompute selective": {"recompute": "selective"},
    "ZeRO 1 alone": {"zero": 1},
}
OPTIMIZER, WEIGHTS = {"offload_optimizer": "cpu"}, {"offload_param": "cpu"}
TWO = {
    "DP2": {},
    "DP2 accumulation 2": {"micro": 2},
    "TP2": {"tp": 2},
    "TP2 SP": {"tp": 2, "sp": True},
    "ZeRO 1": {"zero": 1},
    "ZeRO 2": {"zero": 2},
    "ZeRO 3": {"zero": 3},
    "ZeRO 1 accumulation 2": {"zero": 1, "micro": 2},
    "TP2 SP recompute": {"tp": 2, "sp": True, "recompute": "full"},
    "TP2 ZeRO 3": {"tp": 2, "zero": 3},
    "CP2 ring": {"cp": 2},
    "CP2 Ulysses": {"cp": 2, "kind": "a2a"},
    "CP2 ring ZeRO 1 recompute": {"cp": 2, "zero": 1, "recompute": "full"},
    "CP2 Ulysses ZeRO 3": {"cp": 2, "kind": "a2a", "zero": 3, "micro": 2},
    "ZeRO 2 offload": {"zero": 2, "offload": OPTIMIZER},
    "ZeRO 3 offload of weights, too": {"zero": 3, "offload": OPTIMIZER | WEIGHTS, "micro": 2},
    "PP2": {"pp": 2, "micro": 2},
    "PP2 ZeRO 1 offload": {"pp": 2, "zero": 1, "micro": 2, "offload": OPTIMIZER},
    "PP2 ZeRO 1 recompute": {"pp": 2, "zero": 1, "micro": 2, "recompute": "full"},
}
FOUR = {
    "TP2 DP2 ZeRO 1": {"tp": 2, "zero": 1},
    "TP2 SP DP2 ZeRO 2": {"tp": 2, "sp": True, "zero": 2},
    "CP2 ring DP2 ZeRO 2": {"cp": 2, "zero": 2},
    "CP2 Ulysses TP2 SP ZeRO 1": {"cp": 2, "tp": 2, "sp": True, "kind": "a2a", "zero": 1},
    "ZeRO 3 hpZ": {"zero": 3, "json": {"zero_hpz_partition_size": 2}},
    "CP4 ring": {"cp": 4},
    "CP4 Ulysses ZeRO 1": {"cp": 4, "kind": "a2a", "zero": 1},
    "PP2 DP2 ZeRO 1": {"pp": 2, "zero": 1, "micro": 2},
    "PP2 TP2": {"pp": 2, "tp": 2, "micro": 2},
    "PP2 TP2 SP ZeRO 1": {"pp": 2, "tp": 2, "sp": True, "zero": 1, "micro": 2},
}
BF16_TWO = {f"bf16 ZeRO {stage}": {"zero": stage, "precision": "bf16"} for stage in range(4)}
BF16_TWO |= {
    "bf16 ZeRO 1 offload": {"zero": 1, "offload": OPTIMIZER, "precision": "bf16"},
    "bf16 ZeRO 3 offload of weights, too": {"zero": 3, "offload": OPTIMIZER | WEIGHTS, "precision": "bf16"},
    "bf16 TP2 SP ZeRO 0": {"tp": 2, "sp": True, "precision": "bf16"},
    "bf16 CP2 ring ZeRO 1": {"cp": 2, "zero": 1, "precision": "bf16"},
    "bf16 CP2 Ulysses ZeRO 2": {"cp": 2, "zero": 2, "kind": "a2a", "precision": "bf16"},
    "bf16 PP2 ZeRO 1": {"pp": 2, "zero": 1, "micro": 2, "precision": "bf16"},
}
UNTIED = {"TP2 SP": {"tp": 2, "sp": True}, "ZeRO 3": {"zero": 3}, "PP2": {"pp": 2, "micro": 2}}
PACKED = {
    "DP2 recompute": {"recompute": "full"},
    "recompute selective": {"recompute": "selective", "zero": 1},
    "TP2 SP": {"tp": 2, "sp": True},
    "CP2 ring": {"cp": 2},
    "CP2 Ulysses ZeRO 3": {"cp": 2, "kind": "a2a", "zero": 3},
}
# samples are twice as long as the context, so that scaling acts, and by the length of the whole sample on every rank
SCALED = {"max_position_embeddings": SEQUENCE // 2, "rope_scaling": {"type": "dynamic", "factor": 4.0}}
SCALED_TWO = {
    "TP2": {"tp": 2},
    "TP2 SP recompute": {"tp": 2, "sp": True, "recompute": "full"},
    "CP2 ring": {"cp": 2},
    "CP2 Ulysses ZeRO 2": {"cp": 2, "kind": "a2a", "zero": 2},
    "PP2": {"pp": 2, "micro": 2},
    "PP2 recompute": {"pp": 2, "micro": 2, "recompute": "full"},
}
SCALED_FOUR = {
    "CP2 ring TP2 SP": {"cp": 2, "tp": 2, "sp": True},
    "CP4 ring": {"cp": 4},
    "PP2 TP2 SP ZeRO 1": {"pp": 2, "tp": 2, "sp": True, "zero": 1, "micro": 2},
}
Z_LOSS = {"z_loss_coeff": 0.01}
NORMED = {
    "TP2 SP": {"tp": 2, "sp": True, "training": Z_LOSS},
    "PP2": {"pp": 2, "micro": 2, "training": Z_LOSS},
    "PP2, whole logits": {"pp": 2, "micro": 2, "training": Z_LOSS | {"fused_loss": False}},
    "CP2 ring ZeRO 3": {"cp": 2, "zero": 3, "training": Z_LOSS},
}
UNEVEN = {
    "PP4 by parameters": {"pp": 4, "micro": 2},
    "PP4 of 2, 1, 1, 1": {"pp": 4, "micro": 1, "zero": 1, "layers": [2, 1, 1, 1]},
    "bf16 PP4": {"pp": 4, "micro": 2, "zero": 1, "precision": "bf16"},
    "PP2 DP2 of 1, 4": {"pp": 2, "micro": 2, "zero": 1, "layers": [1, 4]},
}


@pytest.fixture(scope="module")
def reference() -> list[list[float]]:
    return run_layouts(1, {"1 process": {}})["1 process"].lines


@pytest.mark.parametrize(("world", "layouts"), [(1, ALONE), (2, TWO), (4, FOUR)], ids=["1 rank", "2 ranks", "4 ranks"])
def test_every_layout_gives_the_same_run(reference, world, layouts):
    runs = run_layouts(world, layouts)
    table = {name: agreement(reference, run.lines) for name, run in runs.items()}
    for name, value in table.items():
        print(f"{name:28} loss, gradient norm {runs[name].lines[-1]}  {value:.1f} digits")
    assert reference[-1][0] < reference[0][0] - 0.5  # it learns, so the comparison means something
    assert all(value >= DIGITS for value in table.values()), table


def test_an_untied_head_gives_the_same_run():
    whole = run_layouts(1, {"1 process": {}}, untied=True)["1 process"].lines
    for name, run in run_layouts(2, UNTIED, untied=True).items():
        assert agreement(whole, run.lines) >= DIGITS, name


def test_packed_documents_give_the_same_run(reference):
    whole = run_layouts(1, {"1 process": {}}, documents=True)["1 process"].lines
    assert agreement(reference, whole) < 4  # attention that sees less is another run
    for name, run in run_layouts(2, PACKED, documents=True).items():
        assert agreement(whole, run.lines) >= DIGITS, name


def test_dynamic_rope_scaling_gives_the_same_run(reference):
    whole = run_layouts(1, {"1 process": {}}, model=SCALED)["1 process"].lines
    assert agreement(reference, whole) < 3  # it acts
    for world, layouts in ((2, SCALED_TWO), (4, SCALED_FOUR)):
        table = {name: agreement(whole, run.lines) for name, run in run_layouts(world, layouts, model=SCALED).items()}
        print("dynamic RoPE: " + ", ".join(f"{name} {value:.1f} digits" for name, value in table.items()))
        assert all(value >= DIGITS for value in table.values()), table


def test_qk_norm_and_z_loss_give_the_same_run(reference):
    normed = {"qk_layernorm": True}
    plain = run_layouts(1, {"1 process": {}}, model=normed)["1 process"].lines
    whole = run_layouts(1, {"1 process": {"training": Z_LOSS}}, model=normed)["1 process"].lines
    assert agreement(reference, plain) < 3 and agreement(plain, whole) < 3  # both act
    table = {name: agreement(whole, run.lines) for name, run in run_layouts(2, NORMED, model=normed).items()}
    print("QK-norm and z-loss: " + ", ".join(f"{name} {value:.1f} digits" for name, value in table.items()))
    assert all(value >= DIGITS for value in table.values()), table


def test_layers_that_stages_do_not_divide_give_the_same_run():
    whole = run_layouts(1, {"1 process": {}}, num_layers=5)["1 process"].lines
    runs = run_layouts(4, UNEVEN, num_layers=5)
    assert furthest(whole, runs.pop("bf16 PP4").lines).as_bf16_may_be
    for name, run in runs.items():
        assert agreement(whole, run.lines) >= DIGITS, name


def test_bf16_stays_close_to_fp32_at_every_stage(reference):
    for name, run in run_layouts(2, BF16_TWO).items():
        apart = furthest(reference, run.lines)
        print(f"{name}: losses within {apart.loss:.1e} of fp32, gradient norms within {apart.norm:.1e}")
        assert apart.as_bf16_may_be, name
