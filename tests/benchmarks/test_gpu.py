"""benchmarks/gpu.sh at tiny sizes on the CPU: every step has its rows; what they say is not asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu

ROOT = Path(__file__).parents[2]
ROWS = ["versions", "card", "environment", "tests", "loss: fused", "loss: naive", "loss: Liger", "layer: eager"]
ROWS += [f"nano: {what}" for what in ("step", "tokens/s", "utilisation", "peak memory")]


@pytest.mark.timeout(600)
def test_every_step_has_its_rows(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "--smoke", "--output", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = [line.split("|")[1].strip() for line in (tmp_path / "gpu.md").read_text().splitlines()[2:]]
    assert found == [*ROWS, "all steps"]
    assert (tmp_path / "gpu.md").read_text() in done.stdout
    assert set(json.loads((tmp_path / "gpu.json").read_text())["steps"].values()) == {"ok"}
    assert {path.stem for path in tmp_path.glob("*.log")} == {"tests", "loss", "layer", "nano"}


@pytest.mark.parametrize(
    ("code", "seconds", "ending", "rows"),
    [
        ("print('{\"a\": 1}')", 60, "ok", [("a", "1")]),
        ("print('gone'); raise SystemExit(3)", 60, "exit status 3: gone", []),
        ("print('not json')", 60, "output not understood", []),
        (
            "import time; print('{\"a\": 1}', flush=True); time.sleep(60)",
            6,
            'ran past 6 s: {"a": 1}',
            [("a", "1")],
        ),
        ("print('never run')", 1, "left out: the budget was spent", []),
    ],
    ids=["ok", "fails", "other output", "too slow", "too late"],
)
def test_a_step_that_goes_wrong_is_told_and_what_it_said_is_kept(
    code: str, seconds: float, ending: str, rows: gpu.Rows, tmp_path: Path
) -> None:
    step = gpu.Step("x", ["-c", code], 60, lambda output: [(k, str(v)) for k, v in gpu.last_json(output).items()])
    log = tmp_path / "log"
    found, told = gpu.run(step, seconds, log)
    assert found == rows and told.startswith(ending)


def test_the_steps_on_a_gpu_keep_to_the_budget_and_name_what_exists() -> None:
    for smoke in (False, True):
        steps = gpu.steps_of(smoke)
        assert all(step.timeout < gpu.BUDGET for step in steps)
        for step in steps:
            kind, module, *arguments = step.command
            assert kind == "-m" and (module == "pytest" or (ROOT / f"{module.replace('.', '/')}.py").is_file())
            assert all((ROOT / argument).exists() for argument in arguments if argument.startswith("tests/"))
    named = {Path(word).stem for step in gpu.steps_of(False) for word in step.command if word.startswith("tests/")}
    assert named == {path.stem for path in (ROOT / "tests" / "cuda").glob("test_*.py")}, "no GPU test is forgotten"


def test_counts_of_a_pytest_that_was_cut_off() -> None:
    output = (
        "tests/a.py::test_b[x y] PASSED [ 1%]\ntests/a.py::test_c FAILED [ 2%]\ntests/a.py::test_d SKIPPED (no) [ 3%]\n"
    )
    output += "tests/a.py::test_e "
    assert gpu.tests_rows(output) == [("tests", "1 passed, 1 failed, 1 skipped"), ("test failed", "tests/a.py::test_c")]
    with pytest.raises(ValueError, match="no test has ended"):
        gpu.tests_rows("collecting ...")


def test_an_unknown_step_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--only", "nothing"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "choose of tests, loss, layer, nano" in done.stderr
