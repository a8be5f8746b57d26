"""Set-up: pinned requirements, the two commands, and one line for a Python that does not fit."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINES = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]


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
