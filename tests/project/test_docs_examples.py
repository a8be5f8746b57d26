"""The Python examples of the docs run as printed, each page in one go.

`tests/methods` has those with prompts; pages whose examples are checked for more than running have tests of their own.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from pathlib import Path

import pytest

from tests.distributed.launch import run_on_ranks

DOCS = Path(__file__).resolve().parents[2] / "docs"
ELSEWHERE = {"megatron_lm.md": "tests/megatron_lm/test_spec.py", "own_script.md": "tests/project/test_own_script.py"}


def examples() -> dict[str, list[str]]:
    """Page -> its Python blocks without prompts, in order."""
    found: dict[str, list[str]] = {}
    for page in sorted(DOCS.rglob("*.md")):
        blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)
        plain = [block for block in blocks if ">>>" not in block]
        if plain and page.name not in ELSEWHERE:
            found[page.name] = plain
    return found


def run(folder: str) -> dict[str, str]:
    """Run the examples in a folder as the quickstart leaves the checkout.

    Returns:
        Page -> the traceback of its examples, "" where there is none.
    """
    from minicpm_megatron.storage.sharded import write_single
    from tests.convert.conftest import random_tensors, small_model
    from tests.training.nano import write_tokens

    os.chdir(folder)
    sys.path.insert(0, folder)
    Path("examples").symlink_to(DOCS.parent / "examples")
    write_tokens(Path("runs/quickstart/data/train-en"), 4_000, seed=0)
    model, checkpoint = small_model(), Path("runs/quickstart/checkpoints/step-400")
    checkpoint.parent.mkdir(parents=True)
    write_single(checkpoint, random_tensors(model).items(), model.model_dump(mode="json"), {"step": 0, "tokens": 0})
    outcome = {}
    for page, blocks in examples().items():
        outcome[page] = ""
        Path(f"page_{page}".replace(".md", ".py")).write_text("\n".join(blocks), encoding="utf-8")
        try:
            importlib.import_module(f"page_{page}".removesuffix(".md"))
        except Exception:
            outcome[page] = traceback.format_exc()
    return outcome


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    [found] = run_on_ranks("tests.project.test_docs_examples:run", 1, folder=str(tmp_path_factory.mktemp("checkout")))
    return found


@pytest.mark.parametrize("page", examples())
def test_the_examples_run_as_printed(page: str, outcome: dict[str, str]) -> None:
    assert not outcome[page], outcome[page]
