"""Our trainer going on from a checkpoint that it did not write; runs inside `tests.distributed.forked`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tests.training import nano


def worker(rank: int, case: dict[str, Any]) -> dict[str, Any]:
    """One step more of the run `case["folder"]`/runs/imported, whose newest checkpoint has done `case["step"]`.

    Returns:
        "status" of the command, "samples" that were read ([first, size] of each batch), and the "state" it then saved.
    """
    folder, step = Path(case["folder"]), case["step"]
    recipe = nano.write_recipe(folder, training={"global_batch_size": case["samples"]})
    run = nano.case(recipe, "imported", f"training.stop_after={step + 1}", "training.gradient_clipping=0")
    done = nano.train(rank, run)
    shutil.rmtree(folder / "data")
    saved = folder / "runs" / "imported" / "checkpoints" / f"step-{step + 1}"
    return {
        "status": done["status"],
        "samples": [batch[:2] for batch in done["samples"]],
        "state": nano.state(saved) if saved.exists() else None,
    }
