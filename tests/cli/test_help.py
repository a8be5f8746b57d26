"""`--help` of every command: no option without a word on it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest

from minicpm_megatron.cli.windtunnel import main as windtunnel
from tests.cli.commands import ROOT, command

SUBCOMMANDS = [["windtunnel.py", name] for name in windtunnel.SUBCOMMANDS]
SCRIPTS = sorted(path.name for path in (ROOT / "tools").glob("*.py"))


def undescribed(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Options, arguments and commands that the parser, or one of its commands, says nothing about."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            described = {choice.dest for choice in action._choices_actions if choice.help}
            for name, inner in action.choices.items():
                yield from () if name in described else (f"{parser.prog} {name}",)
                yield from undescribed(inner)
        elif not action.help:
            yield f"{parser.prog} {'/'.join(action.option_strings) or action.dest}"


@pytest.mark.parametrize("words", [*([script] for script in [*SCRIPTS, "train.py"]), *SUBCOMMANDS], ids=" ".join)
def test_help_describes_every_option(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[argparse.ArgumentParser] = []
    monkeypatch.setattr(argparse.ArgumentParser, "print_help", lambda parser: printed.append(parser))
    assert command(*words, "--help") == 0
    [parser] = printed
    assert list(undescribed(parser)) == []
