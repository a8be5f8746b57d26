"""Run state: what is written is read back, what earlier versions wrote is read, and what is damaged is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpm_megatron.checkpoint.run_state import FaultEvent, RunState
from minicpm_megatron.errors import UserError, shorten
from minicpm_megatron.recipe import FaultsRecipe
from minicpm_megatron.training.faults import FaultPolicy

# as trainers have written it since the first checkpoint
WRITTEN: dict[str, Any] = {
    "step": 12,
    "samples": 96,
    "tokens": 3072,
    "updates": 11,
    "origin": {"run": "runs/trunk", "step": 10},
    "text": {"eos_token_id": [2, 5]},
    "rates": {"embedding": 0.01, "hidden": 0.004},
    "evaluation_due": True,
    "fault": {"what": "loss", "value": "nan", "step": 13, "samples": [96, 104], "lr": 0.005},
    "faults": {
        "offset": 8,
        "passed_over": [[80, 88]],
        "skipped": 1,
        "rollbacks": [10, 1],
        "past": {"loss": [3.5], "gradient norm": [1]},
    },
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def of(state: Any) -> RunState:
    return RunState.of({"state": state}, "step-12/manifest.json")


def test_the_keys_on_disk_are_those_of_earlier_versions() -> None:
    state = of(WRITTEN)
    assert state.to_json() == {**WRITTEN, "fault": WRITTEN["fault"] | {"samples": (96, 104)}}
    assert json.loads(json.dumps(state.to_json())) == WRITTEN
    assert state.fault == FaultEvent("loss", "nan", 13, (96, 104), 0.005)
    assert state.parent == (Path("runs/trunk"), 10)


def test_what_is_not_known_is_left_out_and_read_as_such() -> None:
    converted = RunState(step=0, tokens=0, origin={"format": "torch_dist"}, text={}, tokenizer="tokenizers/a")
    content = converted.to_json()
    assert not {"samples", "updates", "rates", "faults", "observers"} & content.keys()
    assert content["data"] == {"tokenizer": "tokenizers/a"}, "where conversions have put it"
    assert of(content) == converted and converted.parent is None
    assert of({"step": 3}) == RunState(step=3)
    assert of({"step": 3, "data": {"tokenizer": None}, "of a later version": [1]}) == RunState(step=3)


def test_what_observers_and_faults_keep_travels() -> None:
    policy = FaultPolicy(FaultsRecipe(spike="skip", spike_window=4))
    policy.applied(3.0, 1.0)
    policy.roll_back(10, planned=80, end=120)
    state = RunState(step=1, faults=policy.state(), observers={"counting": {"seen": [1, 2]}})
    read = of(json.loads(json.dumps(state.to_json())))
    assert read.observers == {"counting": {"seen": [1, 2]}}
    again = FaultPolicy(FaultsRecipe(spike="skip", spike_window=4))
    again.load(read.faults)
    assert again.state() == policy.state()


DAMAGED: list[tuple[str, Any]] = [
    ("step", -1),
    ("step", True),
    ("samples", 96.0),
    ("updates", "11"),
    ("origin", {"run": 7, "step": 10}),
    ("origin", {"run": "a", "step": "10"}),
    ("text", [1]),
    ("rates", {"hidden": "fast"}),
    ("rates", None),
    ("evaluation_due", 0),
    ("fault", {"what": "loss"}),
    ("fault", WRITTEN["fault"] | {"samples": [1]}),
    ("faults", {"offset": "8"}),
    ("faults", {"passed_over": [8]}),
    ("faults", {"past": {"loss": [None]}}),
    ("observers", {"wandb": 3}),
    ("data", {"tokenizer": 3}),
]


@pytest.mark.parametrize(("key", "value"), DAMAGED, ids=str)
def test_a_damaged_field_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(UserError) as refusal:
        of(WRITTEN | {key: value})
    assert str(refusal.value).startswith(f"step-12/manifest.json: state.{key} is malformed: {shorten(value)} is not ")
    assert str(refusal.value).endswith("; use another checkpoint")


@given(st.sampled_from([*WRITTEN, "observers", "data"]), JSON)
def test_any_value_is_read_or_refused(key: str, value: Any) -> None:
    try:
        state = of(WRITTEN | {key: value})
    except UserError:
        return
    FaultPolicy(FaultsRecipe()).load(state.faults)
    assert json.loads(json.dumps(state.to_json()))["step"] == state.step
    assert state.parent is None or isinstance(state.parent.run, Path)


def test_a_manifest_without_a_state_is_refused() -> None:
    with pytest.raises(UserError, match="state is malformed: None is not a mapping"):
        RunState.of({}, "manifest.json")
    with pytest.raises(UserError, match="state.step is malformed: None is not a count"):
        of({"samples": 3})
