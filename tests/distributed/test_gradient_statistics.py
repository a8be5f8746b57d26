"""Statistics of consecutive gradients, summed over shards, against whole gradients in plain NumPy."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from tests.distributed.parity import Run, run_layouts

STEPS = 6
DIGITS = ("gradient_norm", "max_gradient", "gradient_cosine", "first_derivative", "second_derivative", "update_norm")
# what layouts of fp32 differ by (measured 2e-5), and products with differences of two gradients (4e-4)
CLOSE, CLOSE_SECOND = 2e-4, 4e-3
HERE = "tests.distributed.test_gradient_statistics"
OFFLOAD = {"offload_optimizer": "cpu"}
TWO: dict[str, dict[str, Any]] = {
    "DP2": {},
    "ZeRO 1": {"zero": 1},
    "ZeRO 1 accumulation 2": {"zero": 1, "micro": 2},
    "ZeRO 2": {"zero": 2},
    "ZeRO 3": {"zero": 3},
    "ZeRO 2 offload": {"zero": 2, "offload": OFFLOAD},
    "ZeRO 3 offload": {"zero": 3, "offload": OFFLOAD},
    "TP2": {"tp": 2},
    "TP2 SP ZeRO 1": {"tp": 2, "sp": True, "zero": 1},
    "TP2 SP ZeRO 3": {"tp": 2, "sp": True, "zero": 3},
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


def watched(world: int, layouts: dict[str, dict[str, Any]], watch: type, **keywords: Any) -> dict[str, Run]:
    return run_layouts(world, layouts, watch=f"{HERE}:{watch.__name__}", steps=STEPS, **keywords)


def agree(found: list[Any], wanted: list[Any], close: float, close_second: float) -> None:
    assert found[0] is wanted[0] is None and len(found) == len(wanted) == STEPS
    for step, (one, other) in enumerate(zip(found[1:], wanted[1:], strict=True)):
        for name, value in other.items():
            bound = close_second if name in ("second_derivative", "curvature") else close
            # a cosine or a slope near zero is the difference of large sums
            scale = {"gradient_cosine": 1.0, "first_derivative": other["gradient_norm"]}.get(name, abs(value))
            assert abs(one[name] - value) <= bound * scale, (step, name, one[name], value)


@pytest.mark.parametrize(
    ("world", "layouts", "model"), [(2, TWO, {}), (4, FOUR, {}), (2, EXPERTS, MIXTURE)], ids=["two", "four", "experts"]
)
def test_shards_add_up_to_what_whole_gradients_say(world, layouts, model) -> None:
    alone = watched(1, {"alone": {}}, Whole, model=model)["alone"].watched
    # something would be seen: gradients are clipped, and the directions and their products differ from step to step
    assert max(each["gradient_norm"] for each in alone[1:]) > 1
    assert len({round(each["gradient_cosine"], 3) for each in alone[1:]}) == STEPS - 1
    for name, run in watched(world, layouts, Sharded, model=model).items():
        try:
            agree(run.watched, alone, CLOSE, CLOSE_SECOND)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def test_bf16_uses_the_fp32_masters_and_the_gradients_as_they_are_accumulated() -> None:
    for run in watched(2, HALF, Gathered).values():
        sharded, whole = zip(*run.watched, strict=True)
        agree(list(sharded), list(whole), 1e-6, 1e-5)
