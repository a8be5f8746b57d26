"""Statistics of consecutive gradients, summed over shards, against whole gradients in plain NumPy."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

import deepspeed  # noqa: F401  (forks should find it imported)
import numpy as np
import pytest
import torch  # noqa: F401
from megatron.core import parallel_state  # noqa: F401

from tests.distributed import parity
from tests.distributed.forked import run_forked

STEPS = 5
DIGITS = ("gradient_norm", "max_gradient", "gradient_cosine", "first_derivative", "second_derivative", "update_norm")
# what fp32 layouts differ by (measured 4e-7), and sums of the very same numbers in another order (4e-11)
CLOSE, THE_SAME = 4e-6, 1e-9
HERE = "tests.distributed.test_gradient_statistics"
OFFLOAD = {"offload_optimizer": "cpu"}
TWO: dict[str, dict[str, Any]] = {
    "DP2": {},
    "ZeRO 1": {"zero": 1},
    "ZeRO 2 accumulation 2": {"zero": 2, "micro": 2},
    "ZeRO 3": {"zero": 3},
    "ZeRO 2 offload": {"zero": 2, "offload": OFFLOAD},
    "ZeRO 3 offload": {"zero": 3, "offload": OFFLOAD},
    "TP2": {"tp": 2},
    "TP2 SP ZeRO 1": {"tp": 2, "sp": True, "zero": 1},
    "PP2, tied": {"pp": 2, "micro": 2},
    "PP2, tied, ZeRO 1": {"pp": 2, "micro": 2, "zero": 1},
    "CP2 ring": {"cp": 2},
    "CP2 Ulysses ZeRO 3": {"cp": 2, "kind": "a2a", "zero": 3},
}
FOUR: dict[str, dict[str, Any]] = {
    "TP2 SP DP2 ZeRO 2": {"tp": 2, "sp": True, "zero": 2},
    "PP2 DP2 ZeRO 1": {"pp": 2, "micro": 2, "zero": 1},
    "PP2 TP2": {"pp": 2, "tp": 2, "micro": 2},
}
MIXTURE = {"num_moe_experts": 4, "moe_ffn_hidden_size": 48}
EXPERTS: dict[str, dict[str, Any]] = {
    "EP2": {"ep": 2},
    "EP2 ZeRO 1": {"ep": 2, "zero": 1},
    "TP2": {"tp": 2, "sp": True},
}
HALF: dict[str, dict[str, Any]] = {f"bf16 ZeRO {zero}": {"zero": zero, "precision": "bf16"} for zero in range(4)}


class Sharded:
    """What training does: keeps shards and adds up."""

    def __init__(self, engine: Any) -> None:
        from minicpm_megatron.engine.gradient_statistics import ConsecutiveGradients
        from minicpm_megatron.engine.state import EngineState

        self.gradients = ConsecutiveGradients(EngineState(engine))

    def __call__(self) -> dict[str, float] | None:
        found = self.gradients.compare()
        self.gradients.keep()
        if found is None:
            return None
        named = {name: getattr(found.sums, name) for name in (*DIGITS, "curvature") if name != "max_gradient"}
        return {**named, "max_gradient": found.max_gradient, **asdict(found.sums)}


class Whole:
    """The formulas of section 4.4 on one flat fp64 vector, where a rank has, or is given, everything."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.before = engine, None

    def flat(self) -> tuple[np.ndarray, np.ndarray]:
        parameters = list(self.engine.module.parameters())
        gradients = [parameter.grad for parameter in parameters]
        return tuple(
            np.concatenate([each.detach().double().numpy().ravel() for each in tensors])
            for tensors in (gradients, parameters)
        )

    def __call__(self) -> dict[str, float] | None:
        now, before = self.flat(), self.before
        self.before = now
        if before is None:
            return None
        (h, after), (g, x) = now, before
        v = after - x
        length = np.linalg.norm
        first, second = h @ v / length(v), (h - g) @ v / length(v) ** 2
        return {
            "gradient_norm": length(g),
            "max_gradient": np.abs(g).max(),
            "gradient_cosine": h @ g / length(g) / length(h),
            "first_derivative": first,
            "second_derivative": second,
            "curvature": abs(second) / (1 + first**2) ** 1.5,
            "update_norm": length(v),
        }


class Gathered(Whole):
    """Whole gradients and fp32 masters by DeepSpeed's own functions, which gather them."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.sharded = Sharded(engine)

    def flat(self) -> tuple[np.ndarray, np.ndarray]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

        gradients, weights = [], []
        for parameter in self.engine.module.parameters():
            gradients.append(safe_get_full_grad(parameter).detach().double().numpy().ravel())
            master = safe_get_full_fp32_param(parameter)
            if master is None:  # ZeRO 0, where the optimizer's own groups have it
                master = self.master(parameter)
            weights.append(master.detach().double().numpy().ravel())
        return np.concatenate(gradients), np.concatenate(weights)

    def master(self, parameter: Any) -> Any:
        optimizer = self.engine.optimizer
        for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for each, master in zip(low, high, strict=True):
                if each is parameter:
                    return master
        raise AssertionError("no master")

    def __call__(self) -> Any:
        return [self.sharded(), super().__call__()]


def worker(rank: int, case: dict[str, Any]) -> dict[str, list[Any]]:
    """Layout -> what `case["watch"]` saw before each update."""
    os.environ["MINICPM_TEST_STORE"] = "unused"  # the ranks have met
    found = parity.train(watch=f"{HERE}:{case['watch']}", steps=STEPS, model=case["model"], layouts=case["layouts"])
    return {name: run["watched"] for name, run in found.items()}


def job(ranks: int, watch: type, layouts: dict[str, dict[str, Any]], model: dict[str, Any]) -> dict[str, Any]:
    return {"ranks": ranks, "watch": watch.__name__, "layouts": layouts, "model": model}


@pytest.fixture(scope="module")
def watched() -> dict[str, dict[str, list[Any]]]:
    """Every job of this file in one go: one import of what is slow to import."""
    jobs = {
        "alone": job(1, Whole, {"": {}}, {}),
        "two": job(2, Sharded, TWO, {}),
        "four": job(4, Sharded, FOUR, {}),
        "mixture alone": job(1, Whole, {"": {}}, MIXTURE),
        "mixture": job(2, Sharded, EXPERTS, MIXTURE),
        "bf16": job(2, Gathered, HALF, {}),
    }
    outcomes = run_forked(f"{HERE}:worker", list(jobs.values()))
    for outcome in outcomes:
        assert [rank.status for rank in outcome] == [0] * len(outcome), "\n".join(rank.log for rank in outcome)
    return {name: outcome[0].result for name, outcome in zip(jobs, outcomes, strict=True)}


def agree(found: list[Any], wanted: list[Any], close: float) -> None:
    assert found[0] is wanted[0] is None and len(found) == len(wanted) == STEPS
    for step, (one, other) in enumerate(zip(found[1:], wanted[1:], strict=True)):
        for name, value in other.items():
            # a cosine or a slope near zero is the difference of large sums
            scale = {"gradient_cosine": 1.0, "first_derivative": other["gradient_norm"]}.get(name, abs(value))
            assert abs(one[name] - value) <= close * scale, (step, name, one[name], value)


def test_the_reference_has_something_to_show(watched: dict[str, dict[str, list[Any]]]) -> None:
    for alone in (watched["alone"][""], watched["mixture alone"][""]):
        assert max(each["gradient_norm"] for each in alone[1:]) > 1, "gradients are clipped after they are measured"
        assert len({round(each["gradient_cosine"], 3) for each in alone[1:]}) == STEPS - 1


CASES = [("two", name) for name in TWO] + [("four", name) for name in FOUR] + [("mixture", name) for name in EXPERTS]


@pytest.mark.parametrize(("ranks", "layout"), CASES)
def test_shards_add_up_to_what_whole_gradients_say(ranks: str, layout: str, watched: dict[str, Any]) -> None:
    alone = watched["mixture alone" if ranks == "mixture" else "alone"][""]
    agree(watched[ranks][layout], alone, CLOSE)


@pytest.mark.parametrize("layout", HALF)
def test_bf16_uses_the_fp32_masters_and_the_gradients_as_they_are_accumulated(layout: str, watched: Any) -> None:
    sharded, whole = zip(*watched["bf16"][layout], strict=True)
    agree(list(sharded), list(whole), THE_SAME)
