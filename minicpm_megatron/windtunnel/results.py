"""results.json: what an experiment found, so that anybody can read it again, compare it, or put it in a report.

    {
      "format": "minicpm_megatron wind tunnel 1",
      "kind":     subcommand that made it: "lr", "wsd", "coord-check" ...
      "title":    one line for people
      "settings": what was asked for (JSON values)
      "recipe":   sha256 of the base recipe (recipe.recipe_hash)
      "data":     prefix -> sha256 of its tokens
      "versions": library -> version
      "machine":  what the results were evaluated on: processor and cores, or GPUs
      "findings": [{"claim", "paper", "ours", "agrees"}]     agrees: true, false or "undecided"
      "tables":   [{"title", "columns": [text], "rows": [[text]]}]
      "pictures": [{"file", "caption"}]                      file: below the experiment's folder
      "cells":    [{"name", "state", "parameters", "tokens", "flops", "seconds", "held_out", "losses", "labels"}]
    }

Of a cell: state is "done", "diverged", "failed" or "missing"; parameters without embeddings; tokens and flops of its
own steps; seconds in steps; held_out the mean held-out loss and losses that of every set, in nats per token, null where
there is none. The keys of labels are the experiment's own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.atomic import write_json
from minicpm_megatron.training.text import aligned

RESULTS = "results.json"
FORMAT = "minicpm_megatron wind tunnel 1"
_CELL = {"name", "state", "parameters", "tokens", "flops", "seconds", "held_out", "losses", "labels"}
Verdict = bool | Literal["undecided"]


@dataclass(frozen=True)
class Finding:
    """One claim of the paper beside what was measured.

    Attributes:
        claim: in words, with its place in the paper.
        paper: its number, as text.
        ours: ours, as text, with how certain it is.
        agrees: "undecided" where the noise, or what was run, leaves it open.
    """

    claim: str
    paper: str
    ours: str
    agrees: Verdict


@dataclass(frozen=True)
class Table:
    """Rows of text under column names; all rows have as many entries as there are columns."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Picture:
    """A PNG beside results.json."""

    file: str
    caption: str


@dataclass(frozen=True)
class Results:
    """Everything in results.json but its format; see the module."""

    kind: str
    title: str
    settings: Mapping[str, Any]
    recipe: str
    data: Mapping[str, str]
    versions: Mapping[str, str]
    findings: tuple[Finding, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    cells: tuple[Mapping[str, Any], ...] = field(default_factory=tuple)
    machine: str = ""


def write_results(results: Results, output: Path) -> Path:
    """Write results.json into `output` atomically; numbers that are not finite become null."""
    path = output / RESULTS
    write_json(path, _finite({"format": FORMAT, **asdict(results)}))
    return path


def read_results(output: Path) -> Results:
    """What `write_results` wrote.

    Raises:
        UserError: there is no such file, or it is not of this form.
    """
    path = output / RESULTS if output.is_dir() else output
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError("no results", where=str(path), fix="give the folder of an experiment that has ended") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot be read as JSON: {error}", where=str(path)) from None
    try:
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        content["findings"] = tuple(Finding(**each) for each in content["findings"])
        content["tables"] = tuple(
            Table(each["title"], tuple(each["columns"]), tuple(tuple(row) for row in each["rows"]))
            for each in content["tables"]
        )
        content["pictures"] = tuple(Picture(**each) for each in content["pictures"])
        content["cells"] = tuple(content["cells"])
        if any(not _CELL <= set(cell) for cell in content["cells"]):
            raise ValueError(f"a cell without one of {', '.join(sorted(_CELL))}")
        if any(len(row) != len(table.columns) for table in content["tables"] for row in table.rows):
            raise ValueError("a row that does not fit its table")
        return Results(**content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"not of the form {FORMAT!r}: {error}", where=str(path)) from None


def format_results(results: Results, folder: Path | None = None) -> str:
    """The results as text for a terminal: findings, tables, and where the pictures are."""
    lines = [results.title]
    for finding in results.findings:
        verdict = {True: "agrees", False: "DISAGREES"}.get(finding.agrees, "undecided")  # type: ignore[arg-type]
        lines += ["", f"{finding.claim}", f"  paper: {finding.paper}", f"  ours:  {finding.ours}", f"  {verdict}"]
    for table in results.tables:
        lines += ["", table.title, *("  " + line for line in aligned([table.columns, *table.rows]))]
    lost = [cell["name"] for cell in results.cells if cell["state"] in ("failed", "missing")]
    if lost:
        lines += ["", f"without {len(lost)} of {len(results.cells)} cells: {', '.join(lost)}"]
    if folder is not None:
        lines += ["", *(f"picture: {folder / picture.file}" for picture in results.pictures)]
        lines.append(f"results: {folder / RESULTS}")
    return "\n".join(lines)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value
