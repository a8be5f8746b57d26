"""Set-up: pinned requirements, the two commands, and one line for a Python that does not fit."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
from pathlib import Path

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
    assert commands[-1] == "exec make test"


def test_make_refuses_another_python_in_one_line(tmp_path):
    fake = tmp_path / "python3.9"
    fake.write_text("#!/bin/sh\nexit 1\n")  # what the version check answers on any other Python
    fake.chmod(0o755)
    done = subprocess.run(
        ["make", "environment", f"PYTHON={fake}", f"VENV={tmp_path / 'venv'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if not key.startswith("MAKE")},
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1 and "is not Python 3.11 or 3.12" in errors[0]
    assert not (tmp_path / "venv").exists()


def test_extras_are_what_the_readme_offers(monkeypatch):
    found = {}
    monkeypatch.setattr("setuptools.setup", lambda **keywords: found.update(keywords))
    runpy.run_path(str(ROOT / "setup.py"))
    assert set(found["extras_require"]) == {"gpu", "dev", "eval"}
    wanted = [requirement for extra in found["extras_require"].values() for requirement in extra]
    assert any(name.startswith("flash-attn") for name in found["extras_require"]["gpu"])
    assert not [name for name in [*wanted, *found["install_requires"]] if name.startswith("apex")]
    assert found["install_requires"] == LINES
    assert found["python_requires"] == ">=3.11,<3.13"
    rooms = {path.parent.name for path in (ROOT / "minicpm_megatron").glob("*/__init__.py")}
    assert rooms == {name.split(".")[1] for name in found["packages"] if name.count(".") == 1}


def test_each_supported_python_has_its_megatron_core():
    pins = {
        marker: version for version, marker in re.findall(r"^megatron-core==([\w.]+); python_version (.+)$", TEXT, re.M)
    }
    check_versions((3, 11), pins['< "3.12"'])
    check_versions((3, 12), pins['>= "3.12"'])
