"""tools/evaluate_positions.py as a user runs it, with input right and wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.commands import Mistake, check_mistake, command_with, tree, untouched
from tests.evaluation.small import write_model_and_tokens

LENGTH = 60
EVALUATE = {"--checkpoint": "model", "--data": "tokens", "--length": str(LENGTH), "--output": "out"}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens and a model."""
    return write_model_and_tokens(tmp_path_factory.mktemp("sound"))


def test_the_command_goes_on_and_reads_what_changed_anew(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = EVALUATE | {"--tokenizer": "tokenizer", "--samples": "4"}
    assert command_with("evaluate_positions.py", options) == 0
    printed = capfd.readouterr().out
    assert "4 windows of tokens" in printed and "32-59" in printed and "out/positions.png" in printed
    first = tree(here / "out")
    assert command_with("evaluate_positions.py", options) == 0
    assert tree(here / "out") == first
    saved = json.loads((here / "out" / "model.json").read_text())
    saved["curve"]["losses"][0] = 99.0
    (here / "out" / "model.json").write_text(json.dumps(saved))
    capfd.readouterr()
    assert command_with("evaluate_positions.py", options) == 0
    assert "99.000" in capfd.readouterr().out  # what is there is not computed again
    assert command_with("evaluate_positions.py", options | {"--samples": "3"}) == 0
    assert "99.000" not in capfd.readouterr().out


CASES: dict[str, Mistake] = {
    "no data": ("evaluate_positions.py", EVALUATE | {"--data": "no"}, untouched, "no.idx: no such token file"),
    "no model": ("evaluate_positions.py", EVALUATE | {"--checkpoint": "no"}, untouched, "no such folder"),
    "no positions": ("evaluate_positions.py", EVALUATE | {"--length": "0"}, untouched, "--length: must be at least 1"),
    "no document so long": (
        "evaluate_positions.py",
        EVALUATE | {"--length": "100000"},
        untouched,
        "no document of more than 100000 tokens; the longest has",
    ),
    "below a file": (
        "evaluate_positions.py",
        EVALUATE | {"--tokenizer": "tokenizer", "--output": "a-file/x"},
        untouched,
        "cannot be written",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_mistake_is_one_line(case: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    check_mistake(CASES[case], here, capfd)
