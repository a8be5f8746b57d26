"""Run state: where a run stands, as a checkpoint's manifest holds it under "state".

`RunState` is the one place that knows the keys of that mapping. Writers make a `RunState` and store `to_json()`;
readers call `RunState.of(manifest)`, which refuses a damaged field with one line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from minicpm_megatron.errors import UserError, shorten

_STATE = "state"
_COUNTS = ("samples", "tokens", "updates")


class Parent(NamedTuple):
    """The checkpoint, or the published folder at step 0, that a run began from."""

    run: Path
    step: int


@dataclass(frozen=True)
class FaultEvent:
    """The step before whose update a run stopped.

    Attributes:
        what: "loss" or "gradient norm".
        value: of it, as text, since JSON has no number for nan.
        step: number of the step, from 1.
        samples: [first, end) of its global batch.
        lr: base learning rate x schedule factor.
    """

    what: str
    value: str
    step: int
    samples: tuple[int, int]
    lr: float


@dataclass(frozen=True)
class RunState:
    """The state of a run after a step, as its checkpoint keeps it.

    Attributes:
        step: steps done.
        samples: samples of the batch plan consumed by then; None: not known, as of a model from elsewhere.
        tokens: tokens of these; None: not known.
        updates: optimizer steps taken, by which Adam corrects its moments; None: not known, there are no moments.
        origin: what the run began from, JSON values; `parent` reads the two that every run writes. None: from nothing.
        text: end tokens and generation settings of an imported model (`convert.text_settings`); None: it has none.
        rates: learning rate of each muP group in the last update.
        evaluation_due: the evaluation at `step` has not been made.
        fault: why the run stopped here, where a fault stopped it.
        faults: `training.faults.FaultPolicy.state()`, JSON values; empty: a run without faults.
        tokenizer: folder of the tokenizer that a conversion recorded. A run's is in the manifest's recipe.
        observers: name of an observer -> its `state_dict()`, JSON values; without those whose state is empty.
    """

    step: int
    samples: int | None = None
    tokens: int | None = None
    updates: int | None = None
    origin: Mapping[str, Any] | None = None
    text: Mapping[str, Any] | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    evaluation_due: bool = False
    fault: FaultEvent | None = None
    faults: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    observers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def parent(self) -> Parent | None:
        """The run or folder that this run began from, where `origin` names one and its step."""
        origin = self.origin or {}
        if not {"run", "step"} <= origin.keys():
            return None
        return Parent(Path(origin["run"]), origin["step"])

    def to_json(self) -> dict[str, Any]:
        """The mapping that a manifest holds under "state"; what is not known is left out."""
        content: dict[str, Any] = {"step": self.step}
        content |= {key: value for key in _COUNTS if (value := getattr(self, key)) is not None}
        content |= {"origin": self.origin, "text": self.text, "evaluation_due": self.evaluation_due}
        content["fault"] = None if self.fault is None else dataclasses.asdict(self.fault)
        content |= {key: value for key in ("rates", "faults", "observers") if (value := getattr(self, key))}
        if self.tokenizer is not None:
            content["data"] = {"tokenizer": self.tokenizer}
        return content

    @classmethod
    def of(cls, manifest: Mapping[str, Any], where: str) -> Self:
        """The state in a manifest; keys that this version does not know are ignored.

        Args:
            where: the manifest's file, for the error line.

        Raises:
            UserError: a field is not of the form that `to_json` writes.
        """
        content = manifest.get(_STATE)
        if not isinstance(content, Mapping):
            raise UserError(f"{_STATE} is malformed: {shorten(content)} is not a mapping", where=where, fix=_FIX)

        def read(key: str, wanted: str, fits: Callable[[Any], bool], absent: Any = None) -> Any:
            if key not in content and absent is not ...:
                return absent
            value = content.get(key)
            if (value is None and absent is None) or fits(value):
                return value
            raise UserError(f"{_STATE}.{key} is malformed: {shorten(value)} is not {wanted}", where=where, fix=_FIX)

        fault = read("fault", "what stopped a run", _is_fault)
        return cls(
            step=read("step", "a count", _is_count, absent=...),
            **{key: read(key, "a count", _is_count) for key in _COUNTS},
            origin=read("origin", "an origin", _is_origin),
            text=read("text", "a mapping", _is_mapping),
            rates=read("rates", "a mapping of numbers", _is_rates, absent={}),
            evaluation_due=read("evaluation_due", "true or false", _is_bool, absent=False),
            fault=None if fault is None else FaultEvent(**fault | {"samples": tuple(fault["samples"])}),
            faults=read("faults", "what a run did about faults", _is_fault_history, absent={}),
            tokenizer=(read("data", "a mapping with the tokenizer's path", _is_data) or {}).get("tokenizer"),
            observers=read("observers", "a mapping of mappings", _is_observers, absent={}),
        )


_FIX = "use another checkpoint"


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _is_rates(value: Any) -> bool:
    return _is_mapping(value) and all(map(_is_number, value.values()))


def _is_origin(value: Any) -> bool:
    return _is_mapping(value) and isinstance(value.get("run", ""), str) and _is_count(value.get("step", 0))


def _is_data(value: Any) -> bool:
    return _is_mapping(value) and (value.get("tokenizer") is None or isinstance(value["tokenizer"], str))


def _is_observers(value: Any) -> bool:
    return _is_mapping(value) and all(map(_is_mapping, value.values()))


def _is_stretch(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(type(end) is int for end in value)


def _is_fault(value: Any) -> bool:
    return (
        _is_mapping(value)
        and value.keys() == {each.name for each in dataclasses.fields(FaultEvent)}
        and isinstance(value["what"], str)
        and isinstance(value["value"], str)
        and _is_count(value["step"])
        and _is_stretch(value["samples"])
        and _is_number(value["lr"])
    )


def _is_fault_history(value: Any) -> bool:
    if not _is_mapping(value):
        return False
    stretches, past = value.get("passed_over", []), value.get("past", {})
    return (
        _is_count(value.get("offset", 0))
        and _is_count(value.get("skipped", 0))
        and _is_stretch(value.get("rollbacks", [-1, 0]))
        and isinstance(stretches, list)
        and all(map(_is_stretch, stretches))
        and _is_mapping(past)
        and all(isinstance(each, list) and all(map(_is_number, each)) for each in past.values())
    )
