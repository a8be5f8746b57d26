"""The contracts over our own entries; those of examples/my_plugin keep them in tests/examples/test_my_plugin.py."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import minicpm_megatron
from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.decay_shapes import DecaySettings, DecayShape, as_decay_shape
from minicpm_megatron.methods.schedule import Schedule, as_schedule
from minicpm_megatron.methods.schedules import Constant
from minicpm_megatron.recipe import build
from minicpm_megatron.registry import DECAY_SHAPES, SCHEDULES, Registry
from tests.methods.contracts import check_decay_shape, check_schedule
from tests.recipe.fields import minimal_fields


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> Registry[Any]:
    """The registry of decay shapes, which forgets what the test adds."""
    monkeypatch.setattr(DECAY_SHAPES, "_entries", dict(DECAY_SHAPES._entries))
    return DECAY_SHAPES


@pytest.mark.parametrize("name", [name for name in DECAY_SHAPES.names() if name != "exponential"])
def test_every_decay_shape(name: str) -> None:
    check_decay_shape(name)


def test_exponential_ends_where_its_half_life_says() -> None:
    shape = DECAY_SHAPES.get("exponential")
    assert (shape.uses_half_life, shape.default_floor) == (True, 0.0)
    assert shape(1.0, DecaySettings(40, 8, shape.default_floor)) == 2**-5


@pytest.mark.parametrize("name", SCHEDULES.names())
def test_every_schedule(name: str) -> None:
    check_schedule(name)


def cubic(progress: float, settings: DecaySettings) -> float:
    return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * (1 - progress**3)


def test_a_plain_function_is_a_shape_without_a_half_life(shapes: Registry[Any]) -> None:
    shapes.add("cubic", cubic)
    assert shapes.get("cubic") == DecayShape(cubic, uses_half_life=False, default_floor=0.1)
    with pytest.raises(UserError, match=r"schedule.half_life: 5.* wsd with cubic decay has no use for it; set"):
        build(minimal_fields(schedule__decay_shape="cubic"))
    assert build(minimal_fields(schedule__decay_shape="cubic", schedule__half_life=None)).schedule.half_life is None


def test_a_shape_that_uses_a_half_life_gets_it(shapes: Registry[Any]) -> None:
    shapes.add("half", DecayShape(lambda r, settings: 0.5 ** (r * 20 / settings.half_life), uses_half_life=True))
    assert build(minimal_fields(schedule__decay_shape="half")).schedule.half_life == 5
    with pytest.raises(UserError, match="schedule.half_life: half decay needs its half-life; give the steps"):
        build(minimal_fields(schedule__decay_shape="half", schedule__half_life=None))


def test_a_shape_that_is_no_decay_is_refused_with_the_recipe(shapes: Registry[Any]) -> None:
    shapes.add("rising", lambda r, settings: r)
    with pytest.raises(UserError, match="schedule.decay_shape: 'rising' is 0.02 at progress 0.02"):
        build(minimal_fields(schedule__decay_shape="rising", schedule__half_life=None))


@pytest.mark.parametrize("entry", [3, "linear", DecaySettings, None])
def test_what_is_no_decay_shape(entry: object) -> None:
    with pytest.raises(TypeError, match="a decay shape must be a DecayShape or a function, not"):
        as_decay_shape(entry)


class Abstract(Schedule):
    """Defines nothing."""


class Greedy(Constant):
    uses = frozenset({"decay", "colour"})


class Untyped(Constant):
    options = dict  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        (len, "a schedule must be a subclass of Schedule, not <built-in function len>"),
        (Constant(total=3), "a schedule must be a subclass of Schedule, not Constant"),
        (Abstract, "Abstract does not define after_warmup, describe"),
        (Greedy, "Greedy uses colour, of decay, decay_shape, half_life, min_lr_ratio, period"),
        (Untyped, "the options of Untyped must be a subclass of ScheduleOptions"),
    ],
)
def test_what_is_no_schedule(entry: object, line: str) -> None:
    with pytest.raises(TypeError, match=line):
        as_schedule(entry)


@pytest.mark.parametrize(
    ("factor", "line"),
    [
        (lambda self, position: float("nan"), "schedule.shape: gives nan at position 10.0, which is no learning rate"),
        (lambda self, position: -1.0, "schedule.shape: gives -1.0 at position 10.0"),
        (lambda self, position: None, "schedule.shape: gives None at position 10.0"),
        (lambda self, position: 1 / 0, "schedule.shape: fails at position 10.0: ZeroDivisionError"),
    ],
)
def test_a_schedule_that_gives_no_learning_rate_is_refused_with_the_recipe(
    factor: Any, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SCHEDULES, "_entries", dict(SCHEDULES._entries))
    SCHEDULES.add("bad", type("Bad", (Constant,), {"after_warmup": factor}))
    with pytest.raises(UserError, match=line):
        build(minimal_fields(schedule={"shape": "bad", "total": 100, "warmup": 10}))


def test_a_schedule_that_cannot_be_built_is_refused_with_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Needy(Constant):
        height: float

    monkeypatch.setattr(SCHEDULES, "_entries", dict(SCHEDULES._entries))
    SCHEDULES.add("needy", Needy)
    with pytest.raises(UserError, match="schedule.shape: 'needy' cannot be built: TypeError: .*'height'"):
        build(minimal_fields(schedule={"shape": "needy", "total": 100}))


ADDED_SHAPE = """

@decay_shape("cubic")
def cubic(progress: float, settings: DecaySettings) -> float:
    return above_floor(1 - progress**3, settings)
"""
ADDED_SCHEDULE = """
from dataclasses import dataclass

from minicpm_megatron.methods.schedules.constant import Constant
from minicpm_megatron.registry import SCHEDULES


@SCHEDULES.register("half")
@dataclass(frozen=True, kw_only=True)
class Half(Constant):
    def after_warmup(self, position: float) -> float:
        return 0.5
"""
ASKED = """
from minicpm_megatron.recipe import build
from minicpm_megatron.methods.schedule import build_schedule
from tests.recipe.fields import minimal_fields
cubic = minimal_fields(schedule__decay_shape="cubic", schedule__half_life=None)
half = minimal_fields(schedule={"shape": "half", "total": 100})
print(*(build_schedule(build(fields)).factor(90) for fields in (cubic, half)))
"""


def test_one_file_changes_for_a_shape_and_one_for_a_schedule(tmp_path: Path) -> None:
    """In a process that imports nothing but the recipe, as a run's start does."""
    source = Path(minicpm_megatron.__file__).parent
    package = shutil.copytree(source, tmp_path / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    with (package / "methods" / "decay_shapes.py").open("a") as file:
        file.write(ADDED_SHAPE)
    (package / "methods" / "schedules" / "half.py").write_text(ADDED_SCHEDULE)
    (tmp_path / "tests").symlink_to(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", ASKED], cwd=tmp_path, capture_output=True, text=True, env={})
    assert done.stdout.split() == [str(0.1 + 0.9 * (1 - 0.5**3)), "0.5"], done.stderr
