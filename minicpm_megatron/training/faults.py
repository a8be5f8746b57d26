"""What a run does about a step whose numbers are wrong: a loss or gradient that is not finite, or that spikes.

Everything here is a pure function of numbers that all ranks share, so that all of them decide the same; the trainer
acts on it. Skipping is the practice of OLMo (`SkipStepOptimizer` of OLMo-core), going back that of PaLM (arXiv
2204.02311, section 5.1).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from minicpm_megatron.recipe import FaultsRecipe

LOSS, GRADIENT_NORM = "loss", "gradient norm"


class FaultyStep(RuntimeError):
    """A step at which the run ends, because its recipe says so or allows no more."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with a step.

    Attributes:
        what: "loss" or "gradient norm".
        value: of it.
        sigmas: standard deviations above the mean of the steps before, for a spike; None: it is not finite.
    """

    what: str
    value: float
    sigmas: float | None = None

    def at(self, step: int, first: int, samples: int) -> str:
        """In words, of the step of that number and its samples [first, first + samples)."""
        value = f"{self.value:.6g}"
        if self.sigmas is not None:
            value += f", {self.sigmas:.1f} standard deviations above those before"
        return f"the {self.what} of step {step} is {value} (samples {first} to {first + samples - 1})"


class SpikeDetector:
    """How far a number lies above the same number of the last steps whose update was applied.

    Args:
        window: steps remembered. There is no judgement before half of them are.
    """

    def __init__(self, window: int) -> None:
        self._past = {what: deque[float](maxlen=window) for what in (LOSS, GRADIENT_NORM)}
        self._fewest = max(2, window // 2)

    def sigmas(self, what: str, value: float) -> float:
        """Standard deviations (of the sample) above the mean; -inf while too few steps are known."""
        past = self._past[what]
        if len(past) < self._fewest:
            return -math.inf
        # exact sums: the ranks' machines must not round differently
        above, deviation = value - statistics.fmean(past), statistics.stdev(past)
        return above / deviation if deviation else math.copysign(math.inf, above) if above else 0.0

    def add(self, loss: float, gradient_norm: float) -> None:
        """Remember a step whose update was applied."""
        self._past[LOSS].append(loss)
        self._past[GRADIENT_NORM].append(gradient_norm)

    def state(self) -> dict[str, list[float]]:
        """JSON values from which `load` goes on."""
        return {what: list(past) for what, past in self._past.items()}

    def load(self, state: dict[str, list[float]]) -> None:
        """Take a state over, of another window too."""
        for what, past in self._past.items():
            past.clear()
            past.extend(state.get(what, ()))


class FaultPolicy:
    """The recipe's answer to faults, and what it has led to so far.

    Attributes:
        offset: samples of the plan that rollbacks passed over: step k reads from `BatchPlan.samples(k)` + offset.
        passed_over: [first, end) of each stretch of samples that a rollback passed over.
    """

    def __init__(self, recipe: FaultsRecipe) -> None:
        self.recipe = recipe
        self.offset = 0
        self.passed_over: list[list[int]] = []
        self._skipped = 0  # since the last good step
        self._rollbacks = [-1, 0]  # step of the checkpoint, and how often the run went back to it
        self._past = SpikeDetector(recipe.spike_window)

    @property
    def judges_spikes(self) -> bool:
        """Whether the gradient norm must be known before the update."""
        return self.recipe.spike != "ignore"

    def judge(self, what: str, value: float) -> Fault | None:
        """The fault of a step whose `what` is `value`, if any; first of all, it must be finite."""
        if not math.isfinite(value):
            return Fault(what, value)
        sigmas = self._past.sigmas(what, value) if self.judges_spikes else -math.inf
        return Fault(what, value, sigmas) if sigmas > self.recipe.spike_sigmas else None

    def answer(self, fault: Fault) -> Literal["ignore", "stop", "skip", "rollback"]:
        """What the recipe wants done."""
        return self.recipe.non_finite if fault.sigmas is None else self.recipe.spike

    def applied(self, loss: float, gradient_norm: float) -> None:
        """Note a good step."""
        self._skipped = 0
        self._past.add(loss, gradient_norm)

    def skip(self) -> bool:
        """Note a step to be skipped; False when there were too many in a row."""
        self._skipped += 1
        return self._skipped <= self.recipe.max_consecutive

    def roll_back(self, step: int, planned: int, end: int) -> bool:
        """Note a rollback, after the state of its checkpoint was loaded; False when it would be one too many.

        Args:
            step: of the checkpoint.
            planned: samples that the plan has consumed by then.
            end: position in the data to go on from.
        """
        times = self._rollbacks[1] if self._rollbacks[0] == step else 0
        self._rollbacks = [step, times + 1]
        self.passed_over.append([planned + self.offset, end])
        self.offset = end - planned
        return times < self.recipe.max_consecutive

    def state(self) -> dict[str, Any]:
        """JSON values from which `load` goes on."""
        return {
            "offset": self.offset,
            "passed_over": self.passed_over,
            "skipped": self._skipped,
            "rollbacks": self._rollbacks,
            "past": self._past.state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a checkpoint's state over; {} is that of a run without faults."""
        self.offset = state.get("offset", 0)
        self.passed_over = [list(stretch) for stretch in state.get("passed_over", ())]
        self._skipped = state.get("skipped", 0)
        self._rollbacks = list(state.get("rollbacks", (-1, 0)))
        self._past.load(state.get("past", {}))
