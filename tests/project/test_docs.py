"""What README and docs name exists: links, commands, options."""

from __future__ import annotations

import contextlib
import io
import re
from functools import cache
from pathlib import Path

import pytest

from minicpm_megatron.cli.main import COMMANDS
from minicpm_megatron.data.records import REASONS
from tests.cli.commands import command

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")),
    *sorted((ROOT / "docs").glob("*.md")),
]
SCRIPTS = [*sorted((ROOT / "tools").glob("*.py")), ROOT / "examples" / "train.py"]


@cache
def help_of(script: str, *subcommand: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert command(Path(script).name, *subcommand, "--help") == 0
    return said.getvalue()


def help_for(script: str, rest: str) -> str:
    """Of the subcommand that `rest` begins with, where the script has subcommands."""
    named = re.match(r"\s+([a-z][\w-]*)(?=\s|$)", rest)
    return help_of(script, named[1]) if named and "SUBCOMMAND" in help_of(script) else help_of(script)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "examples").glob("*.sh"))], ids=lambda page: page.name)
def test_commands_and_their_options_exist(page):
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for script, rest in re.findall(r"((?:tools|examples)/\w+\.py)([^\n`]*)", text):
        assert (ROOT / script).is_file(), script
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", rest.split(";")[0]):
            assert option in help_for(script, rest), f"{script} has no {option}"


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / ".github").rglob("*.md"))], ids=lambda page: page.name)
def test_commands_of_the_front_door_exist(page):
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for name, rest in re.findall(r"(?:^|`|-m )minicpm(?:_megatron)? ([a-z][\w-]*)([^\n`]*)", text, re.M):
        assert name in COMMANDS, name
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", re.split(r"[;#]", rest)[0]):
            assert option in help_for(COMMANDS[name].script, rest), f"minicpm {name} has no {option}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_every_command_explains_itself(script):
    assert "usage:" in help_of(str(script.relative_to(ROOT)))


def test_modules_named_in_the_docs_exist():
    for page in PAGES:
        for name in re.findall(
            r"`(?:minicpm_megatron/)?((?:\w+/)+\w+\.(?:py|yaml|sh))`", page.read_text(encoding="utf-8")
        ):
            assert any((base / name).exists() for base in (ROOT, ROOT / "minicpm_megatron")), f"{page.name}: {name}"


def test_every_class_of_rejected_records_is_explained():
    table = (ROOT / "docs" / "tokens.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([a-z0-9_]+)` \|", table, re.M)) == set(REASONS)
