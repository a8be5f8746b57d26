"""The search on losses whose optimum is known, and what becomes of one that is disturbed or shared out."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from minicpm_megatron.errors import UserError
from minicpm_megatron.windtunnel.experiment import Experiment, format_plan
from minicpm_megatron.windtunnel.results import read_results
from minicpm_megatron.windtunnel.search.findings import read_search
from minicpm_megatron.windtunnel.search.propose import RANDOM_TRIALS, propose, seed_of
from minicpm_megatron.windtunnel.search.search import SearchSettings, plan_search
from minicpm_megatron.windtunnel.search.space import AXES, PAPER, Values, position
from minicpm_megatron.windtunnel.search.trials import TRIALS, Decided, Trial, read_trials, write_trials
from tests.cli.commands import ROOT, command, error_lines, tree
from tests.pictures import drawn, legend_of
from tests.training import nano
from tests.windtunnel.pretended import base, pretend
from tests.windtunnel.warm import WarmTrainer

RANGES = {axis.name: axis.default_range() for axis in AXES}
Loss = Callable[[Values], float]


def settings(**more) -> SearchSettings:
    return SearchSettings(ranges=RANGES, **more)


def place(values: Values) -> np.ndarray:
    """From -1 to 1 on every axis; the paper's set is 0."""
    return np.array([position(values[axis.name], RANGES[axis.name]) for axis in AXES])


BEST = np.array([0.3, 0.0, -0.2, 0.4])
CURVES = np.array([0.6, 0.02, 0.1, 1.0])


def bowl(values: Values) -> float:
    """A parabola on every axis whose minimum, 4.5, is elsewhere than the paper's set."""
    return float(4.5 + CURVES @ (place(values) - BEST) ** 2)


def shares(losses: list[float]) -> np.ndarray:
    """Of each axis in the variance of the bowl, cut where the worst quarter of losses begins, by Sobol's definition."""
    cut, grid = sorted(losses)[math.floor(0.75 * len(losses))], np.linspace(-1, 1, 41)
    sets = np.random.default_rng(0).uniform(-1, 1, (41, 2000, 4))
    found = []
    for axis in range(4):
        fixed = sets.copy()
        fixed[:, :, axis] = grid[:, None]
        values = 4.5 + (fixed - BEST) ** 2 @ CURVES
        found.append(np.minimum(values, cut).mean(axis=1).var())
    return np.array(found) / sum(found)


def search(plan: Callable[[], Experiment], loss: Loss, noise: float = 0.0, until: int = 99) -> Experiment:
    """Run a search of pretended cells as one worker would, by a new process for every cell."""
    known: dict[str, object] = {}
    while True:
        experiment = plan()
        cells = experiment.source.more(known) if known else experiment.every_cell()
        for cell in cells:
            known[cell.name] = cell
            if cell.folder.exists():
                continue
            values = {axis.name: cell.labels[axis.name] for axis in AXES}
            chance = np.random.default_rng([cell.labels["number"], cell.labels["seed"]])
            found = loss(values)
            # a seed that moves all runs alike moves no difference
            found += 0.1 * (cell.labels["seed"] % 3) + noise * chance.standard_normal()
            pretend(cell, found, diverged=None if math.isfinite(found) else "loss was nan in step 3")
        if not cells or len(known) >= until:
            return experiment


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("searched")
    recipe = base(folder)
    return search(lambda: plan_search(recipe, settings(trials=18), folder / "out"), bowl, 0.002)


def test_the_optimum_is_found(searched: Experiment) -> None:
    found = read_search(searched)
    best = found.results[found.best].values
    assert dict(found.paper.values) == PAPER and found.paper.number == 0
    assert bowl(PAPER) - 4.5 > 0.2 and bowl(best) - 4.5 < 0.04
    random = [bowl(each.values) for each in found.results[1:RANDOM_TRIALS]]
    led = [bowl(each.values) for each in found.results[RANDOM_TRIALS:]]
    assert np.median(led) < np.quantile(random, 0.25) and min(led) < min(random)


def test_what_matters_is_found(tmp_path: Path) -> None:
    recipe, chance = base(tmp_path), np.random.default_rng(0)
    drawn = [
        {name: float(low * (high / low) ** chance.random()) for name, (low, high) in RANGES.items()} for _ in range(60)
    ]
    (tmp_path / "out").mkdir()
    write_trials(Decided((Trial(PAPER), *map(Trial, drawn))), tmp_path / "out")

    def diverges(values: Values) -> float:
        return math.inf if bowl(values) > 6 else bowl(values)

    found = read_search(search(lambda: plan_search(recipe, settings(repeats=0), tmp_path / "out"), diverges, 0.002))
    assert sum(math.isinf(each.loss) for each in found.results) > 3
    assert found.importances is not None and found.importances.predicted > 0.8
    # what is cut is no parabola: 0.08 was measured
    assert found.importances.shares == pytest.approx(shares([each.loss for each in found.results]), abs=0.1)


def test_what_was_not_beaten_agrees_and_what_was_does_not(searched: Experiment, tmp_path: Path) -> None:
    with drawn() as figures:
        results = searched.results()
    [figure] = figures
    assert "above the picture, or diverged" in legend_of(figure.axes[0])
    assert [axis.get_xlabel() for axis in figure.axes[1:]] == [axis.key for axis in AXES]
    [finding] = results.findings
    assert finding.agrees is False and "rank" in finding.ours
    paper, best = bowl(PAPER), min(bowl(each.values) for each in read_search(searched).results)
    difference = read_search(searched).difference
    assert paper - best in difference and difference.high - difference.low < 0.05
    assert (searched.output / "search.png").stat().st_size > 10_000

    recipe = base(tmp_path)
    few = settings(trials=4)
    best_at_paper = search(lambda: plan_search(recipe, few, tmp_path / "a"), lambda x: 4.5 + sum(place(x) ** 2), 0.002)
    [finding] = best_at_paper.results().findings
    assert finding.agrees is True and "rank 1 of 4" in finding.ours
    noisy = search(lambda: plan_search(recipe, few, tmp_path / "b"), lambda x: 4.5, 0.3)
    assert noisy.results().findings[0].agrees == "undecided"
    alone = search(lambda: plan_search(recipe, settings(trials=4, repeats=0), tmp_path / "c"), bowl)
    [finding] = alone.results().findings
    assert finding.agrees == "undecided" and "not known without repeats" in finding.ours
    assert "4 settings need 11" in alone.results().tables[0].title


def test_a_search_is_decided_by_its_seed_and_not_by_who_goes_on_with_it(tmp_path: Path) -> None:
    recipe, values = base(tmp_path), {}
    for name, seed, trials in (("once", 1, RANDOM_TRIALS + 2), ("again", 1, RANDOM_TRIALS + 2), ("other", 2, 4)):
        plan = lambda: plan_search(recipe, settings(trials=trials, seed=seed), tmp_path / name)  # noqa: B023, E731
        if name == "again":  # stopped in the middle of what the Gaussian process decides
            search(plan, bowl, until=RANDOM_TRIALS + 1)
        search(plan, bowl)
        decided = read_trials(tmp_path / name)
        assert [trial.told for trial in decided.trials[1:]] == [tuple(range(n)) for n in range(1, trials)]
        assert len({tuple(trial.values.values()) for trial in decided.trials}) == trials
        values[name] = [dict(trial.values) for trial in decided.trials]
    assert values["once"] == values["again"] and values["once"][1:4] != values["other"][1:4]
    for name, (low, high) in RANGES.items():
        assert all(low <= each[name] <= high for each in values["once"])


def test_more_trials_go_on_with_a_search_and_other_ranges_do_not(tmp_path: Path) -> None:
    recipe = base(tmp_path)
    first = search(lambda: plan_search(recipe, settings(trials=3, repeats=0), tmp_path / "out"), bowl)
    assert (first.source.expected, len(first.every_cell())) == (3, 3)
    more = search(lambda: plan_search(recipe, settings(trials=5, repeats=2), tmp_path / "out"), bowl)
    numbers = [(cell.labels["role"], cell.labels["number"]) for cell in more.every_cell()]
    best = read_search(more).best
    repeats = [("repeat", 0)] * 2 + [("repeat", best)] * 2
    assert numbers == [("trial", number) for number in range(5)] + repeats
    a_cell = first.cells[0]
    assert more.costs() == (9, 9 * a_cell.tokens(), 9 * a_cell.flops())
    plan = format_plan(plan_search(recipe, settings(trials=11, repeats=2), tmp_path / "out"))
    assert "6 decided on the way" in plan and f"{15 * a_cell.tokens():,}" in plan


def test_a_run_that_diverges_is_the_worst_and_the_papers_is_not_repeated(tmp_path: Path) -> None:
    recipe = base(tmp_path)

    limit = PAPER["rate"] * 1.01

    def falls(values: Values) -> float:
        return math.inf if values["rate"] > limit else bowl(values)

    experiment = search(lambda: plan_search(recipe, settings(trials=5), tmp_path / "a"), falls)
    found = read_search(experiment)
    assert math.isinf(found.ended[-1].loss) and math.isfinite(found.ended[0].loss)
    rows = experiment.results().tables[-1].rows
    assert {row[-2] for row in rows if float(row[4]) > limit} == {"diverged"}
    experiment = search(
        lambda: plan_search(recipe, settings(trials=5), tmp_path / "b"),
        lambda values: math.inf if values["rate"] == PAPER["rate"] else bowl(values),
    )
    assert len(experiment.every_cell()) == 5  # nothing could be compared
    [finding] = experiment.results().findings
    assert finding.agrees is False and "the paper's diverged, rank 5 of 5" in finding.ours


def test_what_is_running_is_not_tried_twice_and_divergence_drives_away() -> None:
    chance = np.random.default_rng(0)
    known = []
    for _ in range(16):
        values = {name: float(low * (high / low) ** chance.random()) for name, (low, high) in RANGES.items()}
        known.append((values, bowl(values)))
    alone = propose(RANGES, known, [], seed_of(1, 16))
    assert alone == propose(RANGES, known, [], seed_of(1, 16))
    beside = propose(RANGES, known, [alone], seed_of(1, 16))
    assert np.abs(place(beside) - place(alone)).max() > 0.1
    assert bowl(alone) < np.median([loss for _, loss in known])
    lost = [(values, math.inf if place(values)[3] > 0 else loss) for values, loss in known]
    assert place(propose(RANGES, lost, [], seed_of(1, 16)))[3] < 0


GIVEN = ["search", "--recipe", "recipe.yaml", "--size", "32x1"]


def start(warm: WarmTrainer, *more: str) -> subprocess.Popen[str]:
    words = [sys.executable, str(ROOT / "tools" / "windtunnel.py"), *GIVEN, "--launcher", warm.launcher, *more]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def undisturbed(sound: Path, warm: WarmTrainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(sound)
        given = [
            *GIVEN,
            "--launcher",
            warm.launcher,
            "--output",
            str(folder / "out"),
            "--trials",
            "3",
            "--repeats",
            "0",
        ]
        assert command("windtunnel.py", *given) == 0
    return folder / "out"


def test_a_killed_search_goes_on_as_if_nothing_had_been(here: Path, undisturbed: Path, warm: WarmTrainer) -> None:
    folder = here / "out" / "cells" / "trial-001"
    given = ("--output", "out", "--trials", "3", "--repeats", "0")
    process = start(warm, *given)
    while not (here / "out" / "plan.json").exists():
        time.sleep(0.01)
    folder.mkdir(parents=True)
    (folder / "sleep-at-6").touch()
    while not (folder / "asleep").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()  # its trainer is told by the kernel, saves and leaves
    process.communicate()
    again = start(warm, *given)
    text = again.communicate(timeout=200)[0]
    assert again.returncode == 0 and "had come to step" in text
    assert (here / "out" / TRIALS).read_bytes() == (undisturbed / TRIALS).read_bytes()
    cells = [read_results(output).cells for output in (here / "out", undisturbed)]
    assert [(each["name"], each["losses"]) for each in cells[0]] == [
        (each["name"], each["losses"]) for each in cells[1]
    ]
    assert len(cells[0]) == 3 and {each["state"] for each in cells[0]} == {"done"}
    assert nano.losses(folder) == nano.losses(undisturbed / "cells" / "trial-001")
    runs = [Path(each["run"]).name for each in warm.starts(here / "out")]
    assert sorted(set(runs)) == sorted(each["name"] for each in cells[0]) and len(runs) == 4


def test_two_commands_share_a_search(here: Path, warm: WarmTrainer) -> None:
    both = [
        start(warm, "--output", "out", "--trials", "4", "--repeats", "1", *more) for more in (("--workers", "2"), ())
    ]
    outputs = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    decided = read_trials(here / "out")
    assert len(decided.trials) == 4 and len(decided.repeated) == 2 and 0 in decided.repeated
    # who decides while others run is not told what these give
    assert any(len(trial.told) < number for number, trial in enumerate(decided.trials) if number)
    runs = [Path(each["run"]).name for each in warm.starts(here / "out")]
    assert sorted(runs) == sorted(cell["name"] for cell in read_results(here / "out").cells) and len(runs) == 6
    finding = read_results(here / "out").findings[0]
    assert all(finding.ours in text for text in outputs)


def test_a_fault_of_all_runs_does_not_use_the_search_up(here: Path, warm: WarmTrainer, capsys) -> None:
    given = [*GIVEN, "--output", "out", "--trials", "4", "--repeats", "0"]
    assert command("windtunnel.py", *given, "--launcher", "false") == 1
    assert "3 runs have failed: no more are decided on" in capsys.readouterr().out
    assert len(read_trials(here / "out").trials) == 3
    assert command("windtunnel.py", *given, "--launcher", warm.launcher) == 0
    assert {cell["state"] for cell in read_results(here / "out").cells} == {"done"}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: "{",
        lambda content: json.dumps({**content, "format": "x"}),
        lambda content: json.dumps({**content, "trials": []}),
        lambda content: json.dumps({**content, "repeated": [9]}),
        lambda content: json.dumps({**content, "trials": [{"values": {**PAPER, "rate": -1}, "told": []}]}),
        lambda content: json.dumps({**content, "trials": [{"values": {"rate": 1}, "told": []}]}),
    ],
)
def test_damaged_trials_are_one_line(spoil, here: Path, undisturbed: Path, capfd) -> None:
    (here / "out").mkdir()
    content = json.loads((undisturbed / TRIALS).read_text())
    (here / "out" / TRIALS).write_text(spoil(content))
    with pytest.raises(UserError, match=TRIALS):
        read_trials(here / "out")
    before = tree(here)
    assert command("windtunnel.py", *GIVEN, "--output", "out", "--dry-run") == 2
    [line] = error_lines(capfd.readouterr().err)
    assert TRIALS in line and tree(here) == before
