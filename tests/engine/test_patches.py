"""Starting an engine compiles nothing, and a lock that a killed compilation left behind keeps no run waiting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minicpm_megatron.engine import patches
from tests.distributed.forked import run_forked
from tests.engine.test_engine import _engine


def start(rank: int, case: dict[str, Any]) -> list[str]:
    """Files of DeepSpeed's compiled extensions once an engine has started."""
    _engine(case)
    return sorted(path.name for path in Path(case["folder"]).rglob("*") if path.is_file())


@pytest.mark.cpu_only("the extension is DeepSpeed's all-reduce for ranks on one CPU")
def test_no_extension_is_compiled_and_a_stale_lock_is_harmless(tmp_path, monkeypatch):
    stale = tmp_path / "deepspeed_shm_comm" / "lock"
    stale.parent.mkdir()
    stale.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (outcomes,) = run_forked(
        "tests.engine.test_patches:start", [{"stage": 1, "precision": "fp32", "folder": str(tmp_path)}]
    )
    assert [outcome.result for outcome in outcomes] == [["lock"], ["lock"]], outcomes[0].log


def test_the_optimizer_for_bf16_prints_no_screens_of_memory(capsys):
    from deepspeed.runtime import bf16_optimizer, utils

    patches.prepare()
    bf16_optimizer.see_memory_usage("begin bf16_optimizer", force=True)
    assert capsys.readouterr().out == ""
    utils.see_memory_usage("what memory_breakdown asks for", force=True)
    assert capsys.readouterr().out.startswith("what memory_breakdown asks for")
