"""Golden files: loss curves of tiny runs, and every shipped recipe with all its defaults.

`python -m tests.golden` renews them; the commit says why they changed.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, NamedTuple

from minicpm_megatron.recipe import dump_recipe, load_recipe
from tests.distributed.parity import run_layouts

RENEW = "python -m tests.golden"
FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
SHIPPED = sorted((ROOT / "examples" / "recipes").rglob("*.yaml"))


class Case(NamedTuple):
    """A run of `tests.distributed.parity`: 20 steps of a nano model in fp32."""

    ranks: int
    layout: dict[str, Any]
    model: dict[str, Any]


CURVES = {
    "dense": Case(1, {}, {}),
    "experts": Case(1, {}, {"num_moe_experts": 4}),
    "tensor-parallel-2-zero-1": Case(2, {"tp": 2, "zero": 1}, {}),
}


def curve(case: Case) -> list[list[float]]:
    """[loss, gradient norm] of every step, from processes of its own."""
    return run_layouts(case.ranks, {"run": case.layout}, model=case.model)["run"].lines


def curve_path(name: str) -> Path:
    """The file of one of `CURVES`."""
    return FOLDER / "curves" / f"{name}.json"


def read_curve(name: str) -> list[list[float]]:
    """The golden [loss, gradient norm] of every step."""
    return json.loads(curve_path(name).read_text())


def write_curve(name: str, lines: list[list[float]]) -> None:
    """One step a line."""
    curve_path(name).write_text("[\n" + ",\n".join(f"  {json.dumps(line)}" for line in lines) + "\n]\n")


def recipe_path(shipped: Path) -> Path:
    """The file of a shipped recipe."""
    return FOLDER / "recipes" / shipped.relative_to(ROOT / "examples" / "recipes")


def resolved(shipped: Path) -> str:
    """A shipped recipe with its preset and all defaults written out."""
    return dump_recipe(load_recipe(shipped))


def difference(shipped: Path) -> str:
    """Unified diff from the golden file to the recipe as it is resolved now; empty where they are equal."""
    path = recipe_path(shipped)
    before = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    now = resolved(shipped).splitlines(keepends=True)
    return "".join(difflib.unified_diff(before, now, str(path.relative_to(ROOT)), f"{shipped.name}, resolved now", n=2))
