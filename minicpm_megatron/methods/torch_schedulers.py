"""The schedules of `methods.schedules` as torch learning-rate schedulers.

They behave like torch's own: constructed on an optimizer, `step()` after each `optimizer.step()`, `get_last_lr`,
`state_dict`. Every group's rate is its own `initial_lr` times the factor, so the ratios between muP's groups survive
any schedule. DeepSpeed accepts them as `lr_scheduler` (construct on the torch optimizer before `initialize`).

Counting tokens needs the size of the update to come, since an update stands where it ends: give the first at
construction, and `step(tokens=...)` when the size changes (DeepSpeed: `engine.step(lr_kwargs={"tokens": n})`).
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.schedules import FLOOR, WSD, Constant, Cosine, CosineLoop, Schedule

Unit = Literal["steps", "tokens"]


class ScheduleLR(LRScheduler):
    """Any `Schedule` on any torch optimizer.

    Args:
        optimizer: its groups' `lr` at construction are the base rates (`initial_lr` where a group has one).
        schedule: the curve.
        tokens_per_step: size of the first update where the schedule counts tokens.
        last_epoch: as torch's: steps already done, minus one; counting in steps only.

    Raises:
        UserError: tokens_per_step is missing, or given to a schedule in steps; last_epoch with one in tokens.
    """

    def __init__(
        self, optimizer: Optimizer, schedule: Schedule, *, tokens_per_step: int | None = None, last_epoch: int = -1
    ) -> None:
        if (schedule.unit == "tokens") != (tokens_per_step is not None):
            raise UserError(
                f"the schedule counts {schedule.unit} and tokens_per_step is {tokens_per_step}",
                where=type(self).__name__,
                fix="give tokens_per_step for schedules in tokens, and only for those",
            )
        if schedule.unit == "tokens" and last_epoch != -1:
            raise UserError(
                "last_epoch does not say how many tokens were consumed",
                where=type(self).__name__,
                fix="resume with load_state_dict",
            )
        self.schedule = schedule
        self.tokens_per_step = tokens_per_step
        self.position: int = last_epoch + 1
        super().__init__(optimizer, last_epoch)

    def step(self, *, tokens: int | None = None) -> None:  # type: ignore[override]
        """Set the rates for the next update, which consumes `tokens` (default: as many as the one before)."""
        if tokens is not None:
            if self.schedule.unit != "tokens":
                raise UserError("the schedule counts steps, not tokens", where=type(self).__name__)
            self.tokens_per_step = tokens
        self.position += 1 if self.tokens_per_step is None else self.tokens_per_step
        super().step()

    def advance(self, tokens: int) -> None:
        """`step(tokens=tokens)`."""
        self.step(tokens=tokens)

    def get_lr(self) -> list[float | Tensor]:
        """The rate of each group at the current position."""
        factor = self.schedule.factor(self.position)
        return [base * factor for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, as plain numbers. The curve and the base rates are the constructor's business."""
        return {"position": self.position, "last_epoch": self.last_epoch, "tokens_per_step": self.tokens_per_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Stand where `state_dict` stood, and set every group's rate to base times factor there.

        The schedule may be another one than the one that saved (a branch), and so may the base rates: what counts
        are those of this scheduler, whatever rates a loaded optimizer brought along.
        """
        self.position = state_dict["position"]
        self.last_epoch = state_dict["last_epoch"]
        if self.tokens_per_step is not None:
            self.tokens_per_step = state_dict["tokens_per_step"]
        for group, base, rate in zip(self.optimizer.param_groups, self.base_lrs, self.get_lr(), strict=True):
            group["initial_lr"] = base
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = self.get_lr()


class WSDScheduler(ScheduleLR):
    """Warmup-Stable-Decay, equation 1 of the paper.

    Args:
        optimizer: its groups' `lr` at construction are the base learning rates (`initial_lr` where a group has one).
        total: S, length of the run.
        decay: d, length of the decay at its end; 0 for a trunk that only branches.
        warmup: W, length of the linear warmup.
        decay_shape: a name in `registry.DECAY_SHAPES`.
        half_life: H of the exponential shape; independent of `decay`.
        min_lr_ratio: floor; None for the shape's own, 0 for exponential and 0.1 for all others.
        unit: whether lengths count "steps" or "tokens".
        tokens_per_step: size of the first update where they count tokens.
        last_epoch: as torch's: steps already done, minus one; counting in steps only.

    Raises:
        UserError: lengths that do not fit, an unknown shape, or as `ScheduleLR`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        total: float,
        decay: float,
        warmup: float = 0,
        decay_shape: str = "exponential",
        half_life: float | None = None,
        min_lr_ratio: float | None = None,
        unit: Unit = "steps",
        tokens_per_step: int | None = None,
        last_epoch: int = -1,
    ) -> None:
        schedule = WSD(
            total=total,
            warmup=warmup,
            unit=unit,
            decay=decay,
            decay_shape=decay_shape,
            half_life=half_life,
            min_lr_ratio=min_lr_ratio,
        )
        super().__init__(optimizer, schedule, tokens_per_step=tokens_per_step, last_epoch=last_epoch)


class CosineScheduler(ScheduleLR):
    """Cosine(T): falls to its floor at T and stays there (appendix B of the paper).

    Args:
        optimizer: its groups' `lr` at construction are the base learning rates (`initial_lr` where a group has one).
        period: T, where the floor is reached.
        total: S, length of the run; None: without end.
        warmup: length of the linear warmup.
        min_lr_ratio: floor, relative to the base learning rate.
        unit: whether lengths count "steps" or "tokens".
        tokens_per_step: size of the first update where they count tokens.
        last_epoch: as torch's: steps already done, minus one; counting in steps only.

    Raises:
        UserError: lengths that do not fit, or as `ScheduleLR`.
    """

    kind: type[CosineLoop] = Cosine

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        period: float,
        total: float | None = None,
        warmup: float = 0,
        min_lr_ratio: float = FLOOR,
        unit: Unit = "steps",
        tokens_per_step: int | None = None,
        last_epoch: int = -1,
    ) -> None:
        schedule = self.kind(
            total=float("inf") if total is None else total,
            warmup=warmup,
            unit=unit,
            period=period,
            min_lr_ratio=min_lr_ratio,
        )
        super().__init__(optimizer, schedule, tokens_per_step=tokens_per_step, last_epoch=last_epoch)


class CosineLoopScheduler(CosineScheduler):
    """CosineLoop(T): as `CosineScheduler`, but rising again after T.

    Args:
        optimizer: its groups' `lr` at construction are the base learning rates (`initial_lr` where a group has one).
        period: T, where the floor is reached and left again.
        total: S, length of the run; None: without end.
        warmup: length of the linear warmup.
        min_lr_ratio: floor, relative to the base learning rate.
        unit: whether lengths count "steps" or "tokens".
        tokens_per_step: size of the first update where they count tokens.
        last_epoch: as torch's: steps already done, minus one; counting in steps only.

    Raises:
        UserError: lengths that do not fit, or as `ScheduleLR`.
    """

    kind = CosineLoop


class ConstantScheduler(ScheduleLR):
    """The full learning rate after warmup.

    Args:
        optimizer: its groups' `lr` at construction are the base learning rates (`initial_lr` where a group has one).
        warmup: length of the linear warmup.
        unit: whether lengths count "steps" or "tokens".
        tokens_per_step: size of the first update where they count tokens.
        last_epoch: as torch's: steps already done, minus one; counting in steps only.

    Raises:
        UserError: as `ScheduleLR`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup: float = 0,
        unit: Unit = "steps",
        tokens_per_step: int | None = None,
        last_epoch: int = -1,
    ) -> None:
        schedule = Constant(warmup=warmup, unit=unit)
        super().__init__(optimizer, schedule, tokens_per_step=tokens_per_step, last_epoch=last_epoch)
