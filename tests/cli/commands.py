"""Public commands run as a user runs them, in this process so that each case costs no start of Python."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def command(script: str, *arguments: object) -> int:
    """Exit status of tools/SCRIPT or examples/SCRIPT; an exception that escapes it fails the test."""
    path = next(path for path in (ROOT / "tools" / script, ROOT / "examples" / script) if path.is_file())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(path), run_name="__main__")
    return int(ended.value.code or 0)


def command_with(script: str, options: dict[str, str]) -> int:
    """`command` with options as a mapping."""
    return command(script, *[part for option in options.items() for part in option])


def error_lines(text: str) -> list[str]:
    """The lines of standard error that report an error; a progress bar's lines end in a carriage return."""
    return [line for line in re.split(r"[\r\n]", text) if re.match(r"(\S+\.py: )?error: ", line)]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder with its content; None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


# script, its options, what is done to the current folder before, and a part of the message
Mistake = tuple[str, dict[str, str], Callable[[Path], object], str]


def untouched(folder: Path) -> None:
    """What is done to the folder where the options alone are wrong."""


def check_mistake(mistake: Mistake, here: Path, capfd: pytest.CaptureFixture[str], kept: str = "\0") -> None:
    """One line says what is wrong, the status is 2, and the disk is as it was but for names that begin with `kept`."""
    script, options, spoil, message = mistake
    spoil(here)
    before = tree(here)
    capfd.readouterr()
    status = command_with(script, options)
    output = capfd.readouterr()
    [line] = error_lines(output.err)
    assert status == 2, line
    assert message in line and len(line) < 400
    assert "Traceback" not in output.err
    assert {name: content for name, content in tree(here).items() if not name.startswith(kept)} == before
