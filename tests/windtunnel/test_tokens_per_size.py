"""`tokens-per-size`: the command on curves with a known answer, and on input that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from minicpm_megatron.windtunnel.results import read_results
from tests.cli.commands import command, error_lines
from tests.methods.test_tokens_per_size import straight_lines
from tests.pictures import drawn


def write(path: Path, lines: dict) -> Path:
    rows = [f"{n:.0f},{d:.17g},{loss:.17g}" for n, curve in lines.items() for d, loss in zip(*curve, strict=True)]
    path.write_text("n,d,loss\n" + "\n".join(rows))
    return path


def test_llama_2_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv = write(tmp_path / "curves.csv", straight_lines(0.02))
    with drawn() as figures:
        assert command("windtunnel.py", "tokens-per-size", "--csv", csv, "--output", tmp_path / "out") == 0
    assert len(figures) == 1
    text = capsys.readouterr().out
    assert "98.6 (13B to 34B), 72.1 (34B to 70B)" in text and "70 to 100" in text
    results = read_results(tmp_path / "out")
    assert [each.agrees for each in results.findings] == ["undecided"], "one curve a size has no limits"
    assert [row[2] for row in results.tables[0].rows] == ["1e+23", "5e+23"]
    assert (tmp_path / "out" / results.pictures[0].file).stat().st_size > 10_000
    assert command("windtunnel.py", "report", "--runs", tmp_path / "out") == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("n,d\n1e9,1e9\n", "curves.csv:1: has no column loss"),
        ("n,d,loss\n1e9,1e9,3\n1e9,2e9,2\n", "curves.csv: set loss: curves: 1 sizes have no next larger one"),
        ("n,d,loss\n1e9,1e9,3\n2e9,2e9,2\n", "the losses are no curve that falls; give more points"),
        ("n,d,loss\n0.04,1e9,3\n2e9,2e9,2\n", "curves.csv:2: n is 0.04, less than one"),
    ],
)
def test_each_mistake_is_one_line(
    content: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "curves.csv").write_text(content)
    given = ["--csv", tmp_path / "curves.csv", "--output", tmp_path / "out"]
    assert command("windtunnel.py", "tokens-per-size", *given) == 2
    [line] = error_lines(capfd.readouterr().err)
    assert message in line and [path.name for path in tmp_path.iterdir()] == ["curves.csv"]
