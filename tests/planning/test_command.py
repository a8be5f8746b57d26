"""tools/plan.py as it is run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from minicpm_megatron.recipe import dump_recipe
from tests.cli.commands import ROOT, command, error_lines
from tests.planning.tiny import recipe

PRESET = {
    "--preset": "minicpm-1.2b",
    "--sequence-length": "4096",
    "--global-batch-size": "480",
    "--gpu": "h100",
    "--gpus": "8",
}


def plan(options: dict[str, str], *flags: str) -> int:
    return command("plan.py", *[part for option in options.items() for part in option if part], *flags)


def test_json_holds_what_adds_up(capfd: pytest.CaptureFixture[str]) -> None:
    assert plan(PRESET, "--json", "--top", "3") == 0
    found = json.loads(capfd.readouterr().out)
    assert found["fit"] > 3 == len(found["layouts"])
    for layout in found["layouts"]:
        memory, seconds = layout["memory_bytes"], layout["seconds"]
        assert sum(memory.values()) == 2 * memory["total"]
        assert sum(seconds.values()) == pytest.approx(2 * seconds["step"])
        assert layout["activation_bytes_by_recompute"]["full"] < layout["activation_bytes_by_recompute"]["none"]


def test_the_table_fits_a_page(capfd: pytest.CaptureFixture[str]) -> None:
    assert plan(PRESET | {"--gpus": "64"}, "--top", "2") == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("minicpm-1.2b: 480 samples of 4,096 tokens on 64 h100, 8 a node, 67.1 GiB")
    assert lines[2].split()[:5] == ["TP", "PP", "CP", "EP", "DP"]
    assert "2 shown" in lines[6]
    assert max(map(len, lines)) <= 120 and all(line == line.rstrip() for line in lines)


def test_a_recipe_gives_its_own_batch(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert plan({"--recipe": str(ROOT / "examples/recipes/minicpm-2.4b.yaml"), "--gpu": "H200", "--gpus": "16"}) == 0
    assert "960 samples of 4,096 tokens" in capfd.readouterr().out
    path = tmp_path / "own.yaml"
    path.write_text(dump_recipe(recipe()))
    assert plan({"--recipe": str(path), "--gpu": "l40s", "--gpus": "2", "--global-batch-size": "4"}) == 0
    assert "4 samples of 16 tokens" in capfd.readouterr().out


def test_the_plans_in_the_docs_are_what_it_prints(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    plans = re.findall(r"\$ python tools/plan\.py (.*)\n((?:.*\n)*?\d+ layouts fit.*)\n", page)
    assert len(plans) == 5
    for options, table in plans:
        assert command("plan.py", *options.split()) == 0
        assert capfd.readouterr().out.startswith(table)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--gpu": "tpu"}, "--gpu: unknown GPU 'tpu'; give one of a100-40"),
        ({"--gpus": "0"}, "--gpus: 0 is not a number of GPUs"),
        ({"--gpus": "12"}, "--gpus: 12 GPUs are no whole nodes of 8"),
        ({"--gpus": "many"}, "--gpus"),
        ({"--gpus-per-node": "0"}, "--gpus-per-node"),
        ({"--preset": "minicpm-1.3b"}, "minicpm-1.2b"),
        ({"--sequence-length": ""}, "--sequence-length"),
        ({"--sequence-length": "0"}, "data.sequence_length"),
        ({"--sequence-length": "131072"}, "exceed model.max_position_embeddings"),
        ({"--global-batch-size": "-8"}, "training.global_batch_size"),
        ({"--zero-stage": "4"}, "--zero-stage"),
        ({"--zero-stage": "0", "--gpus": "1", "--gpu": "l40s", "--preset": "minicpm-2.4b"}, "none of 1 layouts fits"),
        ({"--recompute": "some"}, "--recompute"),
        ({"--top": "0"}, "--top: must be at least 1"),
        ({"--recipe": "x.yaml"}, "--preset"),
        ({"--recipe": "no.yaml", "--preset": ""}, "no.yaml: cannot read the recipe"),
        ({"--recipe": "fp32.yaml", "--preset": ""}, "training.precision: peak rates are stated for bf16"),
    ],
)
def test_each_mistake_is_one_line(
    changes: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fp32.yaml").write_text(dump_recipe(recipe(training={"precision": "fp32"})))
    if "fp32.yaml" in changes.values():
        changes = changes | {"--sequence-length": "16", "--global-batch-size": "8"}
    options = {key: value for key, value in (PRESET | changes).items() if value}
    assert plan(options) == 2
    output = capfd.readouterr()
    [line] = error_lines(output.err)
    assert message in line and len(line) < 400
    assert output.out == "" and "Traceback" not in output.err
