"""The decay stage through its gradients and updates: section 4.4, figures 7 and 8.

Of every seed one trunk at the full rate, and a decay that leaves it. The trunk goes on at the full rate to the step at
which the decay ends: what the decay is compared with is its own past, and the same steps on the same data without it.
Gradients are measured, and checkpoints kept, from as long before the decay as it lasts, and to its end.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minicpm_megatron.errors import require
from minicpm_megatron.recipe import BatchPlan, Recipe, count_parameters
from minicpm_megatron.recipe.parameters import CHECKPOINT_BYTES
from minicpm_megatron.training.metrics import human
from minicpm_megatron.windtunnel.branching import Timeline, make_branch, make_trunk
from minicpm_megatron.windtunnel.cells import Cell
from minicpm_megatron.windtunnel.decay_stage.findings import evaluate_study
from minicpm_megatron.windtunnel.decay_stage.series import BLOCKS
from minicpm_megatron.windtunnel.experiment import Experiment
from minicpm_megatron.windtunnel.settings import check_different

KIND = "decay-study"
DECAY_SHARE = 0.2
"""The paper's own: figure 8 decays in the last 2,000 of 10,000 steps."""
CHECKPOINTS = 6  # of each window; ours, figure 7 does not say how far its checkpoints are apart


@dataclass(frozen=True)
class StudySettings:
    """What is asked for.

    Attributes:
        decay_share: of the recipe's steps that is decay.
        shape: of the decay.
        checkpoints: intervals between checkpoints in the decay, and as many before it.
        interval: steps between measurements of gradients.
        seeds: each decides initial weights and sample order of a trunk and its decay.
    """

    decay_share: float
    shape: str
    checkpoints: int
    interval: int
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        half = 0 < self.decay_share < 0.5
        require(half, "--decay-share", f"{self.decay_share:g} leaves no window before it", "give less than a half")
        require(
            self.checkpoints >= 2, "--checkpoints", f"{self.checkpoints} are too few to see a change, give 2 or more"
        )
        require(self.interval >= 1, "--interval", f"{self.interval} is no number of steps")
        check_different("--seeds", self.seeds, "seeds")


def plan_study(base: Recipe, settings: StudySettings, output: Path) -> Experiment:
    """A trunk and a decay of every seed.

    Raises:
        UserError: the window begins in the warmup, there are too few steps to measure or to save, an unknown shape,
            or a batch that grows.
    """
    timeline, end = Timeline(base), BatchPlan(base).total_steps()
    length = timeline.decay(end, settings.decay_share)
    leaves = end - length
    measured = (length - length // 2 - 1) // settings.interval  # of the second half, whose last step has no next
    fix = "lengthen schedule.total"
    what = f"a decay of {length} of {end} steps"
    require(measured >= BLOCKS, "--interval", f"{what} has {measured} measurements in its second half of {BLOCKS}", fix)
    require(settings.checkpoints <= length, "--checkpoints", f"{what} has no {settings.checkpoints} steps to save", fix)
    begins = f"{what} and as many before it begin in the warmup of {timeline.warmup_steps}"
    require(leaves - length >= timeline.warmup_steps, "--decay-share", begins, fix)
    cells = [cell for seed in settings.seeds for cell in _of_seed(timeline, output, settings, seed, length, end)]
    size = count_parameters(base.model).total * CHECKPOINT_BYTES
    kept = len(settings.seeds) * (3 * settings.checkpoints + 1)
    notes = (f"checkpoints kept: {kept} of {human(size)}B, {human(kept * size)}B in all",)
    title = f"Decay stage, steps {leaves + 1:,} to {end:,} (section 4.4 of arXiv 2404.06395)"
    return Experiment(KIND, title, asdict(settings), base, tuple(cells), output, evaluate_study, notes)


def _of_seed(
    timeline: Timeline, output: Path, settings: StudySettings, seed: int, length: int, end: int
) -> tuple[Cell, Cell]:
    leaves, count = end - length, settings.checkpoints
    after = [leaves + round(length * number / count) for number in range(count + 1)]
    before = [step - length for step in after]
    common = {"training.seed": seed, "evaluation.interval": max(1, length // count)}
    window = {"interval": settings.interval, "first_step": leaves - length + 1, "last_step": None}
    overrides: dict[str, Any] = common | {"logging.gradient_statistics": window}
    labels = {"seed": seed, "leaves": leaves, "end": end, "saved": [*before, *after[1:]]}
    trunk = make_trunk(timeline, output, f"trunk-s{seed}", [*before, *after], overrides, {"role": "trunk", **labels})
    window = {"interval": settings.interval, "first_step": leaves + 1, "last_step": None}
    overrides = common | {"logging.gradient_statistics": window, "checkpoint.steps": after[1:]}
    decay = make_branch(
        timeline,
        output,
        f"decay-s{seed}",
        trunk,
        end,
        settings.decay_share,
        settings.shape,
        overrides,
        {"role": "decay", **labels},
    )
    return trunk, decay
