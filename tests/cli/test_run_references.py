"""RUN@STEP as the tools take it: a run below ./runs by its name, any run by its path."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from minicpm_megatron.checkpoint.find import resolve_reference
from tests.cli.commands import command_with
from tests.evaluation.small import write_model_and_tokens


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens, a tokenizer, and a run of one checkpoint."""
    folder = write_model_and_tokens(tmp_path_factory.mktemp("sound"))
    shutil.copytree(folder / "model", folder / "runs" / "one" / "checkpoints" / "step-0")
    return folder


@pytest.mark.parametrize("reference", ["one@0", "runs/one@latest", "{here}/runs/one@0"])
def test_generate_and_evaluate_positions_take_it(reference: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = {"--checkpoint": reference.format(here=here), "--tokenizer": "tokenizer"}
    assert command_with("generate.py", given | {"--prompt": "a", "--max-new-tokens": "2"}) == 0
    positions = given | {"--data": "tokens", "--length": "40", "--samples": "1", "--output": "out"}
    assert command_with("evaluate_positions.py", positions) == 0
    name = reference.rpartition("/")[2]
    assert (here / "out" / f"{name}.json").is_file() and f"  {name}\n" in capfd.readouterr().out
    for tool, options in (("generate.py", given | {"--prompt": "a"}), ("evaluate_positions.py", positions)):
        capfd.readouterr()
        assert command_with(tool, options | {"--checkpoint": "one@5"}) == 2
        assert "one@5: runs/one has no checkpoint at step 5; choose one of: 0" in capfd.readouterr().err


def test_a_name_is_looked_up_below_runs_beside_the_given_folder(here: Path) -> None:
    wanted = Path("runs/one/checkpoints/step-0")
    assert resolve_reference("one@0", Path("elsewhere")) == resolve_reference("runs/one@0", Path("elsewhere")) == wanted
