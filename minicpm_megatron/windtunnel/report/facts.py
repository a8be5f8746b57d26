"""What a page says of an experiment besides its findings: what was run, and on what."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minicpm_megatron.errors import UserError
from minicpm_megatron.training.metrics import duration, human
from minicpm_megatron.windtunnel.results import RESULTS, Results, Verdict, read_results

VERDICTS = ("agrees", "disagrees", "undecided")
_HASH = 12  # digits of a sha256 that people compare


def verdict(agrees: Verdict) -> str:
    """One of VERDICTS."""
    return "undecided" if agrees == "undecided" else "agrees" if agrees else "disagrees"


def count_verdicts(all_results: Sequence[Results]) -> str:
    """For instance "12 claims: 7 agree, 2 disagree, 3 undecided"."""
    found = Counter(verdict(each.agrees) for results in all_results for each in results.findings)
    agree, disagree, undecided = (found[name] for name in VERDICTS)
    return f"{found.total()} claims: {agree} agree, {disagree} disagree, {undecided} undecided"


def facts(results: Results) -> list[tuple[str, str]]:
    """(what, text) of everything that decides the numbers; what is not known is left out."""
    rows = [
        ("asked for", _pairs(results.settings)),
        ("recipe", f"sha256 {results.recipe[:_HASH]}" if results.recipe else ""),
        ("tokens" if results.cells else "losses", _pairs({key: value[:_HASH] for key, value in results.data.items()})),
        ("runs", _runs(results.cells)),
        ("machine", results.machine),
        ("versions", _pairs(results.versions)),
    ]
    return [(what, text) for what, text in rows if text]


def find_results(folders: Sequence[Path]) -> list[tuple[Path, Results]]:
    """(folder, results) of experiments; a folder of experiments stands for those in it, by name.

    Raises:
        UserError: no results, or damaged ones.
    """
    found = []
    for folder in folders:
        inside = [] if (folder / RESULTS).exists() else sorted(path.parent for path in folder.glob(f"*/{RESULTS}"))
        found += [(each, read_results(each)) for each in inside or [folder]]
    places = [folder.resolve() for folder, _ in found]
    for place in places:
        if places.count(place) > 1:
            raise UserError("given twice", where=str(place))
    return found


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_text(value)}" for key, value in values.items() if value not in (None, "", [], ()))


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return " ".join(
            "x".join(map(_text, each)) if isinstance(each, (list, tuple)) else _text(each) for each in value
        )
    return value if isinstance(value, str) else json.dumps(value)


def _runs(cells: Sequence[Mapping[str, Any]]) -> str:
    if not cells:
        return ""
    states = Counter(cell["state"] for cell in cells)
    sizes = [cell["parameters"] for cell in cells]
    told = ", ".join(f"{count} {state}" for state, count in states.items())
    tokens, flops = (sum(cell[key] for cell in cells) for key in ("tokens", "flops"))
    seconds = sum(cell["seconds"] or 0 for cell in cells)
    steps = f"; {duration(seconds)} of steps" if seconds else ""  # what runs in the process itself is not timed
    return (
        f"{told}; {min(sizes):,} to {max(sizes):,} parameters without embeddings; {tokens:,} tokens;"
        f" {human(flops)}FLOPs{steps}"
    )
