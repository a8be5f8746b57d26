"""Losses as CSV, one line a checkpoint and held-out set, so that a law can be fitted to anybody's.

Columns, in any order, others are ignored: `n` parameters without embeddings, `d` tokens (both absolute numbers, not in
1e9), `loss` in any unit, and `set`, the held-out set, which may be left out where there is one only.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.atomic import write_bytes
from minicpm_megatron.windtunnel.law.losses import LossSet, Measurement, Sets

COLUMNS = ("n", "d", "loss")
SET = "set"
ONLY_SET = "loss"  # name of the set where there is no column for it


def read_losses(
    path: Path, check: Callable[[str, Sequence[Measurement]], object] = LossSet.of
) -> dict[str, list[Measurement]]:
    """Name of each set -> its measurements, in the order of the file.

    Args:
        check: raises UserError where the measurements of a set of that name will not do; default: for a fit.

    Raises:
        UserError: the file cannot be read, lacks a column, has a value that is no positive number, or a set too few
            points for a fit; `where` is FILE:LINE.
    """
    rows = _rows(path)
    line, header = next(rows, (1, []))
    names = [name.strip().lower() for name in header]
    for column in COLUMNS:
        if names.count(column) != 1:
            fault = "no column" if column not in names else "two columns"
            raise UserError(
                f"has {fault} {column}", where=f"{path}:{line}", fix="begin with a line n,d,loss or n,d,loss,set"
            )
    sets: dict[str, list[Measurement]] = {}
    begins: dict[str, int] = {}
    for line, row in rows:
        entries = dict(zip(names, (entry.strip() for entry in row), strict=False))
        n, d, loss = (_value(entries.get(column), column, f"{path}:{line}") for column in COLUMNS)
        name = entries.get(SET, "") if SET in names else ONLY_SET
        if not name:
            raise UserError("has no set", where=f"{path}:{line}", fix="name it, or leave the column out")
        begins.setdefault(name, line)
        sets.setdefault(name, []).append(Measurement(n, d, loss))
    if not sets:
        raise UserError("has no losses", where=f"{path}:{line}", fix="give one line a checkpoint")
    for name, measurements in sets.items():
        try:
            check(name, measurements)
        except UserError as error:
            column = f"{error.where} " if error.where in COLUMNS else ""
            what = f"set {name}: {column}{error.what}"
            raise UserError(what, where=f"{path}:{begins[name]}", fix=error.fix) from None
    return sets


def write_losses(sets: Sets, path: Path) -> Path:
    """Write what `read_losses` reads, atomically; losses keep all their digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*COLUMNS, SET))
    for name, measurements in sets.items():
        for each in measurements:
            writer.writerow((f"{each.parameters:.15g}", f"{each.tokens:.15g}", repr(each.loss), name))
    write_bytes(path, text.getvalue().encode())
    return path


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, entries) of every line that is not empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError("is not UTF-8 text", where=f"{path}:{line}", fix="save it as CSV in UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            if any(entry.strip() for entry in row):
                yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"is not CSV: {error}", where=f"{path}:{reader.line_num}") from None


def _value(text: str | None, column: str, where: str) -> float:
    if not text:
        raise UserError(f"has no {column}", where=where, fix="give a number")
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{column} is {text[:40]!r}, which is no number", where=where, fix="give a number") from None
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{column} is {text}, not a positive number", where=where, fix="leave that line out")
    if column != "loss" and value < 1:
        raise UserError(
            f"{column} is {text}, less than one", where=where, fix="give absolute numbers, 4e7 for 0.04 billion"
        )
    return value
