"""The example plugin, installed for real into a folder of its own, works in a process that sees the folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minicpm_megatron.methods.schedule import build_schedule
from minicpm_megatron.registry import ATTENTION_KERNELS, DECAY_SHAPES, SCHEDULES
from tests.methods.contracts import check_decay_shape, check_schedule, recipe_of
from tests.model.attention_contract import check_attention_kernel

ROOT = Path(__file__).parents[2]
DRY_RUN = """
import sys
from minicpm_megatron.cli.dry_run import format_dry_run
from minicpm_megatron.cli.entry import run
from minicpm_megatron.recipe import load_recipe
run(lambda: print(format_dry_run(load_recipe(sys.argv[1], sys.argv[2:]), 1)))
"""
OVERRIDES = ["preset=my-wide-tiny", "schedule.decay_shape=square", "schedule.half_life="]


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


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin as this process finds it, for one test."""
    monkeypatch.syspath_prepend(str(site))
    for registry in (DECAY_SHAPES, SCHEDULES, ATTENTION_KERNELS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


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


@pytest.mark.usefixtures("installed")
def test_the_decay_shape_keeps_the_contract() -> None:
    assert "square" in DECAY_SHAPES.names()
    check_decay_shape("square")


@pytest.mark.usefixtures("installed")
def test_the_schedule_keeps_the_contract_and_its_formula() -> None:
    assert "my-step-decay" in SCHEDULES.names()
    check_schedule("my-step-decay")
    schedule = build_schedule(recipe_of("my-step-decay", options={"shares": [0.5, 0.75], "ratio": 0.5}))
    for step in range(1, 1001):
        expected = min(step / 100, 1.0) if step <= 500 else 0.5 if step <= 750 else 0.25
        assert schedule.factor(schedule.total * step / 1000) == pytest.approx(expected, rel=1e-12), step


@pytest.mark.usefixtures("installed")
def test_the_attention_kernel_keeps_the_contract() -> None:
    assert "my-rows" in ATTENTION_KERNELS.names()
    check_attention_kernel("my-rows")


@pytest.mark.parametrize("name", ["docs/extending.md"])
def test_the_diffs_on_the_page_are_the_plugins(name: str) -> None:
    """Each block of added lines stands in the file that its diff names."""
    page = (ROOT / name).read_text(encoding="utf-8")
    diffs = re.findall(r"^```diff\n(.*?)^```", page, re.S | re.M)
    assert diffs
    for diff in diffs:
        for _, path, body in re.findall(r"^--- (.*)\n\+\+\+ b/(.*)\n((?:[-+@ ].*\n)+?)(?=--- |\Z)", diff, re.M):
            text = (ROOT / path).read_text(encoding="utf-8")
            for block in re.findall(r"^(?:\+.*\n)+", body, re.M):
                added = "".join(f"{line[1:]}\n" for line in block.splitlines())
                assert added in text, f"{path}: {added}"
