"""Set-up: pinned requirements, the two commands, and one line for a Python that does not fit."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
from pathlib import Path

import yaml

import minicpm_megatron
from minicpm_megatron.versions import check_versions

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "requirements.txt").read_text()
LINES = [line for line in TEXT.splitlines() if line and not line.startswith("#")]


def test_every_requirement_is_pinned():
    assert all(re.match(r"[\w-]+==[\w.]+(; .+)?$", line) for line in LINES), LINES
    assert "torch==2.13.0" in LINES and not any(line.startswith("apex") for line in LINES)


def test_ci_runs_what_a_user_runs():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert commands[-2:] == ["make check", "exec make test"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(re.search(rf"^{name} +#", readme, re.M) for name in ("make check", "make test"))


def _make_environment(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "environment", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if not key.startswith("MAKE")} | environment,
    )


def _script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_make_refuses_another_python_in_one_line(tmp_path):
    fake = _script(tmp_path / "python3.9", "exit 1")  # what the version check answers on any other Python
    done = _make_environment(f"PYTHON={fake}", f"VENV={tmp_path / 'venv'}")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1 and "no Python 3.12 runs here" in errors[0]
    assert str(fake) in errors[0] and not (tmp_path / "venv").exists()


def test_make_passes_over_a_shim_that_only_prints_an_error(tmp_path):
    shims = tmp_path / "shims"
    for name in ("python3.12", "python3", "python"):
        _script(shims / name, "echo 'pyenv: python3.12: command not found' >&2; exit 127")
    # stands for the version manager's own install: passes the check, and says so instead of making an environment
    real = _script(
        tmp_path / "home" / ".pyenv" / "versions" / "3.12.1" / "bin" / "python3.12",
        '[ "$1" = -c ] && exit 0; echo "asked to run $*"; exit 1',
    )
    path = f"{shims}{os.pathsep}/usr/bin{os.pathsep}/bin"
    done = _make_environment("PYTHON=", f"VENV={tmp_path / 'venv'}", PATH=path, HOME=str(tmp_path / "home"))
    assert f"with {real}" in done.stdout and "asked to run -m venv" in done.stdout, done.stdout + done.stderr


def test_an_environment_of_another_python_is_made_anew(tmp_path):
    old = _script(tmp_path / "venv" / "bin" / "python", "exit 1")
    new = _script(tmp_path / "python3.12", '[ "$1" = -c ] && exit 0; echo "asked to run $*"; exit 1')
    done = _make_environment(f"PYTHON={new}", f"VENV={old.parents[1]}")
    assert f"asked to run -m venv --clear {old.parents[1]}" in done.stdout


def test_torch_can_come_from_another_index(tmp_path):
    url = "https://download.pytorch.org/whl/cpu"
    said = _make_environment("--dry-run", f"VENV={tmp_path / 'venv'}", f"TORCH_INDEX={url}").stdout
    assert [url in line for line in said.splitlines() if " -m pip install " in line] == [True, False, False]
    assert url in (ROOT / "README.md").read_text(encoding="utf-8")


def test_extras_are_what_the_readme_offers(monkeypatch):
    found = {}
    monkeypatch.setattr("setuptools.setup", lambda **keywords: found.update(keywords))
    runpy.run_path(str(ROOT / "setup.py"))
    assert set(found["extras_require"]) == {"gpu", "dev", "docs", "eval"}
    assert found["version"] == minicpm_megatron.__version__
    assert "py.typed" in found["package_data"]["minicpm_megatron"]
    wanted = [requirement for extra in found["extras_require"].values() for requirement in extra]
    assert any(name.startswith("flash-attn") for name in found["extras_require"]["gpu"])
    assert not [name for name in [*wanted, *found["install_requires"]] if name.startswith("apex")]
    assert found["install_requires"] == LINES
    assert found["python_requires"] == ">=3.12,<3.13"
    rooms = {path.parent.name for path in (ROOT / "minicpm_megatron").glob("*/__init__.py")}
    assert rooms == {name.split(".")[1] for name in found["packages"] if name.count(".") == 1}


def test_the_pinned_megatron_core_is_the_supported_one():
    check_versions((3, 12), re.search(r"^megatron-core==([\w.]+)$", TEXT, re.M)[1])


def test_the_version_stands_in_one_place():
    version = re.escape(minicpm_megatron.__version__)
    written = [
        path.name
        for path in (ROOT / "setup.py", ROOT / "pyproject.toml", *(ROOT / "minicpm_megatron").rglob("*.py"))
        if re.search(rf"version.*[\"']{version}[\"']", path.read_text(encoding="utf-8"))
    ]
    assert written == ["__init__.py"]


def test_hooks_before_a_commit_come_from_the_environment():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in hooks["repos"]] == ["local"]
    for hook in hooks["repos"][0]["hooks"]:
        assert hook["language"] == "system" and hook["entry"].startswith(".venv/bin/")


def test_the_fast_tests_exist():
    listed = (ROOT / "tests" / "fast.txt").read_text().split()
    assert len(listed) == len(set(listed)) and all((ROOT / path).exists() for path in listed)
