"""The example plugin, installed for real into a folder of its own, works in a process that sees the folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DRY_RUN = """
import sys
from minicpm_megatron.cli.dry_run import format_dry_run
from minicpm_megatron.cli.entry import run
from minicpm_megatron.recipe import load_recipe
run(lambda: print(format_dry_run(load_recipe(sys.argv[1], sys.argv[2:]), 1)))
"""
OVERRIDES = [
    "preset=my-wide-tiny",
    "schedule.decay_shape=square",
    "schedule.half_life=",
    "logging.observers=[metrics-jsonl, best-loss]",
    "training.objective=focal",
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plugin installed; built from a copy, because setuptools builds inside the source."""
    source = shutil.copytree(ROOT / "examples" / "my_plugin", tmp_path_factory.mktemp("source") / "my_plugin")
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--disable-pip-version-check", "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return target


def dry_run(*paths: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT)))}
    recipe = ROOT / "examples" / "recipes" / "quickstart.yaml"
    return subprocess.run(
        [sys.executable, "-c", DRY_RUN, str(recipe), *OVERRIDES],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )


def test_preset_and_decay_shape_are_found(site: Path) -> None:
    done = dry_run(site)
    assert done.returncode == 0, done.stderr
    # 2 x (4 x 512^2 + 3 x 512 x 1280 + 2 x 512) + 512
    assert "6,031,872" in done.stdout
    assert "square decay over 75" in done.stdout
    # half-way through the decay: 1 - 0.9 / 4
    assert "0.775" in done.stdout
    assert "objective: focal" in done.stdout and "observers: [metrics-jsonl, best-loss]" in done.stdout


LOADED = """
from minicpm_megatron.recipe import load_recipe
from minicpm_megatron.registry import OBJECTIVES, OBSERVERS
for found in (OBSERVERS.get("best-loss"), OBJECTIVES.get("focal")):
    print(type(found(None)).__name__)
"""


def test_observer_and_objective_are_loaded_by_name(site: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (site, ROOT)))}
    command = [sys.executable, "-c", LOADED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.split() == ["BestLoss", "Focal"], done.stderr


def test_without_the_plugin_both_names_are_unknown() -> None:
    done = dry_run()
    assert done.returncode == 2
    assert done.stderr.startswith("error: override 'preset=my-wide-tiny': preset: unknown preset 'my-wide-tiny'")
    assert done.stderr.count("\n") == 1


def test_a_broken_plugin_is_one_line_that_names_it(site: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(site, tmp_path / "broken")
    (broken / "minicpm_my_plugin" / "decay.py").write_text("raise RuntimeError('not today')\n")
    done = dry_run(broken)
    assert done.returncode == 2
    assert "plugin minicpm-my-plugin cannot provide the decay shape 'square'" in done.stderr
    assert "RuntimeError: not today" in done.stderr
    assert done.stderr.count("\n") == 1
