"""Expert loads: how evenly a mixture's experts were used, every logging.interval steps."""

from __future__ import annotations

from dataclasses import asdict

from minicpm_megatron.recipe import Recipe
from minicpm_megatron.training.metrics import EXPERTS
from minicpm_megatron.training.observer import Measurement, Observer, RunInfo, StepRecord


class ExpertLoads(Observer):
    """Sums the routers' counts over all ranks."""

    everywhere = True

    def __init__(self, recipe: Recipe) -> None:
        self._interval = recipe.logging.interval

    def on_start(self, run: RunInfo) -> None:
        """Remember the model."""
        self._run = run

    def on_step(self, record: StepRecord) -> None:
        """Ask the routers what they did since the last time, and say so."""
        if record.step % self._interval and record.step != self._run.total:
            return
        from minicpm_megatron.training.expert_load import take_loads  # with it comes Megatron-Core

        assert self._run.model is not None and self._run.config is not None
        loads = take_loads(self._run.model, self._run.config)
        if not loads:
            return
        scalars: dict[str, float | None] = {}
        for load in loads:
            tag = f"{EXPERTS}/layer_{load.layer:03}"
            scalars |= {f"{tag}/share_{expert}": share for expert, share in enumerate(load.share)}
            scalars |= {f"{tag}/{key}": value for key, value in asdict(load).items() if key not in ("layer", "share")}
        self._run.tell(Measurement(EXPERTS, record.step, {"layers": [asdict(load) for load in loads]}, scalars))


def expert_loads(recipe: Recipe) -> ExpertLoads | None:
    """The observer, or None for a dense model."""
    return None if recipe.model.num_moe_experts is None else ExpertLoads(recipe)


OBSERVER = expert_loads
