"""Observers without a run: the contract of every registered one, and what becomes of one that fails."""

from __future__ import annotations

import json
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minicpm_megatron.checkpoint.ranks import Ranks
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import Recipe, load_recipe
from minicpm_megatron.registry import OBSERVERS
from minicpm_megatron.training.metrics import METRICS, read_metrics
from minicpm_megatron.training.observation import Factory, Observers, observer_factories
from minicpm_megatron.training.observer import Evaluation, Observer, RunInfo, StepRecord
from minicpm_megatron.training.observers.wandb import WandB
from tests.training import nano

DEFAULT = ("metrics-jsonl", "tensorboard", "console", "expert-loads", "gradient-statistics")
OPTIONAL = ("wandb", "mlflow")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe(nano.write_recipe(tmp_path), ["name=x"])


def begin(
    recipe: Recipe, folder: Path, factories: dict[str, Factory], states: dict[str, Any] | None = None
) -> Observers:
    """Observers that have begun a run of 10 steps."""
    folder.mkdir(exist_ok=True)
    observers = Observers(factories, recipe, Ranks(None))
    observers.load_state_dict(states or {})
    observers.start(
        RunInfo(
            recipe=recipe,
            folder=folder,
            rank=0,
            start=0,
            total=10,
            evaluation_due=False,
            flops_per_token=lambda length: 2e6,
            peak_flops=4e9,
            tell=observers.tell,
        )
    )
    return observers


def step(number: int) -> StepRecord:
    return StepRecord(number, 1000 * number, 3.0 / number, 0.01, 1.5, 0.5, 1000, 100)


def train(observers: Observers, *, to: int = 3, start: int = 0) -> dict[str, Any]:
    """A few steps with all that can happen; returns the states that a checkpoint would hold."""
    for number in range(start + 1, to + 1):
        observers.before_update(number)
        observers.step(step(number))
        observers.evaluation(Evaluation(number, 1000 * number, {"en": {"loss_per_token": 3.0, "loss_per_byte": None}}))
        observers.save(number, 0.1)
    states = dict(observers.state_dict())
    observers.end()
    return states


@pytest.mark.parametrize("name", OBSERVERS.names())
def test_a_registered_observer_is_made_without_a_trace_and_follows_a_run(
    name: str, recipe: Recipe, tmp_path: Path, standing_in: None
) -> None:
    before = sorted(tmp_path.rglob("*"))
    observer = OBSERVERS.get(name)(recipe)
    assert sorted(tmp_path.rglob("*")) == before, "every rank makes it, and only on_start may leave anything"
    assert observer is None or isinstance(observer, Observer)
    assert observer is None or observer.state_dict() == {}, "nothing has happened"
    observers = begin(recipe, tmp_path / "run", {name: OBSERVERS.get(name)})
    states = train(observers)
    assert observers.failure is None and json.loads(json.dumps(states)) == states
    again = begin(recipe, tmp_path / "run", {name: OBSERVERS.get(name)}, states)
    assert train(again, start=2) == states


def test_the_default_is_what_every_run_has_had(recipe: Recipe) -> None:
    assert recipe.logging.observers == DEFAULT
    made = {name: make(recipe) for name, make in observer_factories(recipe).items()}
    # a dense model of which no gradient is measured, and TensorBoard is switched off
    assert [name for name, observer in made.items() if observer is not None] == ["metrics-jsonl", "console"]


@pytest.mark.parametrize(
    ("names", "line"),
    [
        ("[console, tensorbord]", "logging.observers: unknown observer 'tensorbord'; did you mean tensorboard?"),
        ("[console, console]", "logging.observers: names console twice; give each once"),
    ],
)
def test_a_wrong_name_is_refused_with_the_recipe(names: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        load_recipe(nano.write_recipe(tmp_path), ["name=x", f"logging.observers={names}"])
    assert line in str(refusal.value)


class Failing(Observer):
    """Fails in one call, and notes the others."""

    def __init__(self, call: str, error: BaseException) -> None:
        self.calls: list[str] = []

        def fail(*_: Any) -> Any:
            self.calls.append(call)
            raise error

        setattr(self, call, fail)

    def on_step(self, record: StepRecord) -> None:
        self.calls.append("on_step")


CALLS = ("on_start", "before_update", "on_step", "on_evaluation", "on_save", "state_dict", "on_end")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("error", [OSError("disk"), SystemExit(3)], ids=["error", "leaves"])
def test_a_failing_observer_is_left_out_with_one_line(
    call: str, error: BaseException, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = Failing(call, error)
    factories = {"failing": lambda recipe: failing} | observer_factories(recipe)
    observers = begin(recipe, tmp_path / "run", factories)
    train(observers)
    observers.check()
    said = capsys.readouterr().err
    assert said.startswith("note: the observer failing is left out from here on: ") and said.count("\n") == 1
    assert failing.calls.count(call) == 1 and (call in ("state_dict", "on_end") or len(failing.calls) <= 2)
    assert [line["step"] for line in read_metrics(tmp_path / "run" / METRICS)] == [1, 2, 3]


def test_a_state_that_is_no_json_fails_the_observer_and_not_the_save(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Odd(Observer):
        def state_dict(self) -> dict[str, Any]:
            return {"folder": Path("here")}

    assert begin(recipe, tmp_path / "run", {"odd": lambda recipe: Odd()}).state_dict() == {}
    assert "the observer odd is left out from here on: TypeError" in capsys.readouterr().err


def test_what_is_no_observer_is_left_out(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(begin(recipe, tmp_path / "run", {"odd": lambda recipe: "console"}))  # type: ignore[dict-item, return-value]
    assert "observer odd is left out from here on: TypeError: it is a str, not an Observer" in capsys.readouterr().err


def test_an_essential_observer_is_asked_about(recipe: Recipe, tmp_path: Path) -> None:
    class Essential(Failing):
        essential = True

    observers = begin(recipe, tmp_path / "run", {"it": lambda recipe: Essential("before_update", OSError("disk"))})
    assert observers.failure is None
    observers.before_update(1)
    with pytest.raises(UserError, match="the observer it: OSError: disk"):
        observers.check()


def test_states_of_observers_that_are_not_here_are_kept(recipe: Recipe, tmp_path: Path) -> None:
    states = {"wandb": {"id": "abc"}}
    assert begin(recipe, tmp_path / "run", {}, states).state_dict() == states
    broken = begin(recipe, tmp_path / "run", {"wandb": lambda recipe: Failing("on_start", OSError())}, states)
    assert broken.state_dict() == states, "a start without the package must not lose the run's id"


def test_one_that_never_comes_back_from_a_checkpoint_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(nano.write_recipe(tmp_path), ["name=x", "training.hang_timeout=1"])
    never = threading.Event()

    class Slow(Observer):
        def on_checkpoint(self, folder: Path) -> None:
            never.wait()

    observers = begin(recipe, tmp_path / "run", {"slow": lambda recipe: Slow()})
    observers.checkpoint(Path("step-5"))
    assert capsys.readouterr().err == (
        "note: the observer slow is left out from here on: TimeoutError: not done with step-5 after 1 s\n"
    )
    never.set()


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_missing_package_is_one_line_that_says_what_to_install(
    name: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    train(begin(recipe, tmp_path / "run", {name: OBSERVERS.get(name)}))
    assert capsys.readouterr().err == (
        f"note: the observer {name} is left out from here on: the package {name} is not installed; pip install {name}\n"
    )


class Curves:
    """Stands in for both services: what was logged, by run id."""

    def __init__(self) -> None:
        self.runs: dict[str, list[tuple[int, str, float]]] = {}
        self.ended: list[str] = []

    def begin(self, run: str | None) -> str:
        run = run or f"run-{len(self.runs)}"
        self.runs.setdefault(run, [])
        return run


def _wandb(curves: Curves) -> types.ModuleType:
    module: Any = types.ModuleType("wandb")

    class Run:
        def __init__(self, run: str | None) -> None:
            self.id = curves.begin(run)

        def define_metric(self, name: str, step_metric: str) -> None:
            assert (name, step_metric) == ("*", "step")

        def log(self, values: dict[str, float]) -> None:
            curves.runs[self.id] += [(values["step"], tag, value) for tag, value in values.items() if tag != "step"]

        def finish(self) -> None:
            curves.ended.append(self.id)

    def init(*, id: str | None, mode: str, dir: str, resume: str | None, config: dict[str, Any], **more: Any) -> Run:
        assert mode == "offline" and Path(dir).is_dir() and config["name"] == more["name"] == "x"
        assert resume == (None if id is None else "allow")
        return Run(id)

    module.init, module.Settings = init, lambda **settings: settings
    return module


def _mlflow(curves: Curves) -> types.ModuleType:
    module: Any = types.ModuleType("mlflow")

    class Client:
        def __init__(self, tracking_uri: str) -> None:
            assert tracking_uri.startswith("file://") and tracking_uri.endswith("/run/mlflow")

        def get_experiment_by_name(self, name: str) -> None:
            return None

        def create_experiment(self, name: str) -> str:
            return "7"

        def create_run(self, experiment: str, run_name: str) -> Any:
            assert (experiment, run_name) == ("7", "x")
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id=curves.begin(None)))

        def set_tag(self, run: str, key: str, value: str) -> None:
            assert key == "recipe_hash"

        def update_run(self, run: str, status: str) -> None:
            assert status == "RUNNING" and run in curves.runs

        def log_batch(self, run: str, metrics: list[Any]) -> None:
            curves.runs[run] += [(each.step, each.key, each.value) for each in metrics]

        def set_terminated(self, run: str) -> None:
            curves.ended.append(run)

    def metric(key: str, value: float, timestamp: int, step: int) -> Any:
        return types.SimpleNamespace(key=key, value=value, step=step)

    module.MlflowClient, module.entities = Client, types.SimpleNamespace(Metric=metric)
    return module


STAND_INS: dict[str, Callable[[Curves], types.ModuleType]] = {"wandb": _wandb, "mlflow": _mlflow}


@pytest.fixture
def standing_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Curves]:
    """Both packages replaced by stand-ins."""
    curves = Curves()
    for name, make in STAND_INS.items():
        monkeypatch.setitem(sys.modules, name, make(curves))
    for variable in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    yield curves


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_service_gets_every_number_in_one_run_over_two_starts(
    name: str, recipe: Recipe, tmp_path: Path, standing_in: Curves
) -> None:
    factories = {name: OBSERVERS.get(name), "metrics-jsonl": OBSERVERS.get("metrics-jsonl")}
    states = train(begin(recipe, tmp_path / "run", factories), to=2)
    assert states == {name: {"id": "run-0"}}
    train(begin(recipe, tmp_path / "run", factories, states), start=2, to=3)
    assert list(standing_in.runs) == ["run-0"] and standing_in.ended == ["run-0", "run-0"]
    logged = standing_in.runs["run-0"]
    assert [(at, value) for at, tag, value in logged if tag == "train/loss"] == [(1, 3.0), (2, 1.5), (3, 1.0)]
    keys = {f"train/{key}" for key in read_metrics(tmp_path / "run" / METRICS)[0]} & {tag for _, tag, _ in logged}
    assert {"train/lr", "train/gradient_norm", "train/utilisation"} <= keys
    assert (3, "evaluation/en/loss_per_token", 3.0) in logged and (3, "checkpoint/stall_seconds", 0.1) in logged
    assert not any("loss_per_byte" in tag for _, tag, _ in logged), "it is not known"


@pytest.mark.parametrize("name", OPTIONAL)
def test_the_real_package_goes_on_with_its_run(
    name: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(name)
    for variable in ("WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    states = train(begin(recipe, tmp_path / "run", {name: OBSERVERS.get(name)}), to=2)
    assert train(begin(recipe, tmp_path / "run", {name: OBSERVERS.get(name)}, states), start=2, to=3) == states
    assert "is left out" not in capsys.readouterr().err
    if name == "wandb":
        found = list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{states[name]['id']}"))
        assert len(found) == 2, "one run of two starts, for wandb sync"
    else:
        import mlflow

        client = mlflow.MlflowClient((tmp_path / "run" / "mlflow").resolve().as_uri())
        losses = client.get_metric_history(states[name]["id"], "train/loss")
        assert [(each.step, each.value) for each in losses] == [(1, 3.0), (2, 1.5), (3, 1.0)]


def test_wandb_keeps_the_id_it_is_given() -> None:
    observer = WandB(Recipe.model_construct())
    observer.load_state_dict({"id": "abc"})
    assert observer.state_dict() == {"id": "abc"}


def test_a_board_that_cannot_be_opened_leaves_the_metrics_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(nano.write_recipe(tmp_path), ["name=x", "logging.tensorboard=true"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("in the way")
    observers = begin(recipe, tmp_path / "run", dict(observer_factories(recipe)))
    train(observers)
    observers.check()
    assert "note: the observer tensorboard is left out" in capsys.readouterr().err
    assert len(read_metrics(tmp_path / "run" / METRICS)) == 3
