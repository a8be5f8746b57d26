"""Muon is one run under every layout, and orthogonalises each hidden matrix once a step and nothing else.

Newton-Schulz multiplies small singular values by 3.4445^5 = 485, and rounding errors of gradients with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.parity import agreement, furthest, run_layouts

DIGITS = 6  # of fp32; measured: 6.1 with ZeRO 1 to 3, as AdamW, and 6.2 to 6.8 without
MUON: dict[str, Any] = {
    "optimizer": {"name": "muon", "lr": 0.01},
    "steps": 8,
    "watch": "tests.distributed.test_muon:Orthogonalised",
}
EXPERTS: dict[str, Any] = {"model": {"num_moe_experts": 4}}
TWO = {
    "DP2": {},
    "ZeRO 1": {"zero": 1},
    "ZeRO 2": {"zero": 2},
    "ZeRO 3": {"zero": 3},
    "TP2": {"tp": 2},
    "TP2 SP ZeRO 1": {"tp": 2, "sp": True, "zero": 1},
    "CP2 ring ZeRO 1": {"cp": 2, "zero": 1},
    "PP2": {"pp": 2, "micro": 2},
    "ZeRO 2 offload": {"zero": 2, "offload": {"offload_optimizer": "cpu"}},
    "ZeRO 3 offload": {"zero": 3, "offload": {"offload_optimizer": "cpu"}},
}
FOUR = {
    "TP2 DP2": {"tp": 2},
    "TP2 SP DP2 ZeRO 2": {"tp": 2, "sp": True, "zero": 2},
    "TP2 DP2 ZeRO 3": {"tp": 2, "zero": 3},
    "PP2 DP2 ZeRO 1": {"pp": 2, "zero": 1, "micro": 2},
}
BF16 = {f"bf16 ZeRO {stage}": {"zero": stage, "precision": "bf16"} for stage in range(4)}
OF_EXPERTS = {
    "EP2": {"ep": 2},
    "EP2 ZeRO 1": {"ep": 2, "zero": 1},
    "EP2 ZeRO 2": {"ep": 2, "zero": 2},
    "ZeRO 3": {"zero": 3},
    "TP2 SP": {"tp": 2, "sp": True},
}
OF_EXPERTS_FOUR = {
    "TP2 SP EP2 ZeRO 1": {"tp": 2, "sp": True, "ep": 2, "zero": 1},
    "EP2 DP4": {"ep": 2},  # replicas of experts are other ranks than those of all else
}


class Orthogonalised:
    """Stands before the optimizer's matrices; called before an update it returns what all ranks did in the last one.

    Each is (name, smallest and largest singular value of what came out, without sqrt(fan_out / fan_in)).
    """

    def __init__(self, engine: Any) -> None:
        optimizer = engine.zero.inner
        self.inner, optimizer.matrices = optimizer.matrices, self
        self.dtype = self.inner.dtype
        self.seen: list[tuple[str, float, float]] = []

    def transform(self, updates: Mapping[Any, Any], function: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        def watched(name: str, matrix: torch.Tensor) -> torch.Tensor:
            result = function(name, matrix)
            values = torch.linalg.svdvals(result.float()) / (matrix.size(0) / matrix.size(1)) ** 0.5
            self.seen.append((name, float(values.median()), float(values.max())))
            return result

        self.inner.transform(updates, watched)

    def __call__(self) -> list[Any]:
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, self.seen)
        self.seen = []
        return sorted(sum(everyone, []))


def hidden_matrices(experts: int = 0) -> list[str]:
    """By hand: seven matrices in each of two layers, of each expert three."""
    names = []
    for layer in range(2):
        attention, mlp = (f"decoder.layers.{layer}.{part}" for part in ("self_attention", "mlp"))
        names += [f"{attention}.linear_qkv.weight:{part}" for part in ("query", "key", "value")]
        names.append(f"{attention}.linear_proj.weight")
        owners = [f"{mlp}.experts.local_experts.{number}" for number in range(experts)] or [mlp]
        for owner in owners:
            names += [f"{owner}.linear_fc1.weight:gate", f"{owner}.linear_fc1.weight:up", f"{owner}.linear_fc2.weight"]
    return sorted(names)


def check(whole: Any, layouts: dict[str, Any], runs: Mapping[str, Any], experts: int = 0) -> None:
    """Every run is that of one process, and orthogonalised what it should."""
    table = {name: agreement(whole.lines, run.lines) for name, run in runs.items()}
    print("Muon: " + ", ".join(f"{name} {value:.1f} digits" for name, value in table.items()))
    for name, run in {"1 process": whole, **runs}.items():
        assert run.watched[0] == []
        for step in run.watched[1:]:
            assert [each for each, _, _ in step] == hidden_matrices(experts), name
            assert all(0.3 < median < largest < 1.25 for _, median, largest in step), name
    assert all(value >= DIGITS for name, value in table.items() if "bf16" not in name), table


@pytest.fixture(scope="module")
def reference() -> Any:
    return run_layouts(1, {"1 process": {}}, **MUON)["1 process"]


@pytest.mark.parametrize(("world", "layouts"), [(2, TWO), (4, FOUR)], ids=["2 ranks", "4 ranks"])
def test_every_layout_gives_the_same_run(reference: Any, world: int, layouts: dict[str, Any]) -> None:
    check(reference, layouts, run_layouts(world, layouts, **MUON))
    assert reference.lines[-1][0] < reference.lines[0][0] - 0.2  # it learns, so the comparison means something


def test_an_untied_head_gives_the_same_run() -> None:
    whole = run_layouts(1, {"1 process": {}}, untied=True, **MUON)["1 process"]
    check(whole, {}, run_layouts(2, {"TP2 ZeRO 1": {"tp": 2, "zero": 1}}, untied=True, **MUON))


def test_experts_give_the_same_run() -> None:
    whole = run_layouts(1, {"1 process": {}}, **EXPERTS, **MUON)["1 process"]
    for world, layouts in ((2, OF_EXPERTS), (4, OF_EXPERTS_FOUR)):
        check(whole, layouts, run_layouts(world, layouts, **EXPERTS, **MUON), experts=4)


def test_bf16_stays_close_to_fp32_at_every_stage(reference: Any) -> None:
    runs = run_layouts(2, BF16, **MUON)
    check(reference, BF16, runs)
    for name, run in runs.items():
        apart = furthest(reference.lines, run.lines)
        print(f"{name}: losses within {apart.loss:.1e} of fp32, gradient norms within {apart.norm:.1e}")
        assert apart.as_bf16_may_be, name
