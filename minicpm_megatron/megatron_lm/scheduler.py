"""MiniCPM's WSD in Megatron-LM's trainer: a scheduler that keeps the ratios of muP's groups.

Megatron-LM's own WSD calls another curve exponential (2 x 0.5^r - 1, `megatron-exponential` in `methods.schedules`),
and gives its first update the learning rate of position 0. Here every update has the factor of `methods.schedules`,
whose position counts the update that is made.
"""

from __future__ import annotations

import argparse
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.training.global_vars import get_args

from minicpm_megatron.errors import UserError
from minicpm_megatron.megatron_lm.optimizer import group_multipliers
from minicpm_megatron.methods.schedules import WSD

# what methods.schedules calls the lengths, and Megatron-LM's command line
OPTIONS = {
    "schedule.total": "--lr-decay-iters or -samples",
    "schedule.warmup": "--lr-warmup-iters, -samples or -fraction",
    "schedule.decay": "--lr-wsd-decay-iters or -samples",
    "schedule.decay_shape": "--wsd-decay-shape",
    "schedule.half_life": "--wsd-half-life-iters or -samples",
}


def position_of(args: argparse.Namespace, samples: float) -> float:
    """Samples, which Megatron-LM's trainer counts, in the schedule's unit: tokens with --train-samples, else steps."""
    position = samples * args.seq_length if args.train_samples else samples / args.global_batch_size
    return int(position) if position == int(position) else position


def wsd_from_args(args: argparse.Namespace, *, total: float, warmup: float, decay: float) -> WSD:
    """The schedule that Megatron-LM's arguments describe.

    Args:
        total, warmup, decay: in samples.

    Raises:
        UserError: lengths that do not fit, or an unknown curve.
    """
    if args.train_samples:
        half_life = args.wsd_half_life_samples and position_of(args, args.wsd_half_life_samples)
    else:
        half_life = args.wsd_half_life_iters
    try:
        return WSD(
            total=position_of(args, total),
            warmup=position_of(args, warmup),
            decay=position_of(args, decay),
            unit="tokens" if args.train_samples else "steps",
            decay_shape=args.wsd_decay_shape,
            half_life=half_life,
            min_lr_ratio=args.min_lr / args.lr,
        )
    except UserError as error:
        raise UserError(error.what, where=OPTIONS.get(error.where, error.where), fix=error.fix) from error


class MiniCPMParamScheduler(OptimizerParamScheduler):
    """Megatron-Core's scheduler with MiniCPM's WSD, for optimizers with the groups of `mup_config_overrides`.

    With another --lr-decay-style than WSD the curve is Megatron-Core's own; the ratios of the groups stay muP's.

    Args:
        optimizer, keywords: as OptimizerParamScheduler's, which Megatron-LM's trainer fills in from its arguments.

    Raises:
        UserError: a group of the optimizer is none of `mup_config_overrides`, or the schedule does not fit.
    """

    def __init__(self, optimizer: Any, **keywords: Any) -> None:
        self._args = args = get_args()
        self._multipliers = group_multipliers(args)
        self.schedule: WSD | None = None
        if keywords["lr_decay_style"] == "WSD":
            total, warmup, decay = (keywords[name] for name in ("lr_decay_steps", "lr_warmup_steps", "wsd_decay_steps"))
            self.schedule = wsd_from_args(args, total=total, warmup=warmup, decay=decay)
        super().__init__(optimizer, **keywords)

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """The learning rate of a group for the update to come.

        It follows from the group's roles and this run's base learning rate, whatever a checkpoint put into the group.
        """
        name = param_group.get("name")
        if name not in self._multipliers:
            raise UserError(
                f"an optimizer group is called {name!r}, which no group of muP is",
                where="Megatron-LM's optimizer",
                fix="call use_minicpm_training(model_config) before pretrain()",
            )
        multiplier = self._multipliers[name]
        param_group["lr_mult"] = multiplier
        param_group["max_lr"], param_group["min_lr"] = self.max_lr * multiplier, self.min_lr * multiplier
        if self.schedule is None:
            return float(super().get_lr(param_group))
        return float(param_group["max_lr"] * self.factor)

    @property
    def factor(self) -> float:
        """The schedule's factor of the update to come, which ends one global batch after the samples consumed."""
        assert self.schedule is not None
        return self.schedule.factor(position_of(self._args, self.num_steps + self._args.global_batch_size))

    def state_dict(self) -> dict[str, Any]:
        """Megatron-Core's, and the curve in words."""
        return super().state_dict() | {"minicpm_schedule": self._described()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Stand where `state_dict` stood.

        Raises:
            UserError: the curve is another one, and --override-opt_param-scheduler does not say that it is meant to be.
        """
        saved = state_dict.get("minicpm_schedule", self._described())
        if saved != self._described() and not self.override_opt_param_scheduler:
            raise UserError(
                f"the checkpoint was trained by {saved}, the command line asks for {self._described()}",
                where="learning-rate schedule",
                fix="repeat the arguments, or give --override-opt_param-scheduler",
            )
        super().load_state_dict(state_dict)

    def _described(self) -> str:
        return self.lr_decay_style if self.schedule is None else self.schedule.describe()
