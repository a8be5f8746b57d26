"""metrics.jsonl read back, and figures as text; `training.observers.metrics_jsonl` writes the file.

It holds a line for every step ("kind": "train"), every evaluation ("evaluation"), every checkpoint ("checkpoint"),
every step that logging.gradient_statistics asks for ("gradients") and, of a mixture, for the experts' load every
logging.interval steps ("experts"). What undid steps stands in a line of its own ("event").
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from minicpm_megatron.storage.atomic import write_bytes

METRICS = "metrics.jsonl"
GRADIENTS = "gradients"  # the kind of line that compares a step's gradient with the next one's
EXPERTS = "experts"  # the kind of line that says how a mixture's experts were used


def read_metrics(path: Path, kind: str = "train", needs: Collection[str] = ()) -> list[dict[str, Any]]:
    """Return the lines of one kind in a metrics.jsonl, in order.

    A line that is no metrics line, for instance since a bit of it flipped, is left out and named once on standard
    error. A last line that a kill cut short is left out without a word.

    Args:
        path: the file; there need not be one.
        kind: of the lines.
        needs: keys that the caller reads besides "kind" and "step". A line without one of them is no metrics line.
    """
    if not path.exists():
        return []
    return [record for record, _ in _lines(path, {kind: needs}) if record["kind"] == kind]


def parse_line(line: bytes, needs: Mapping[str, Collection[str]] | None = None) -> dict[str, Any] | None:
    """Return a line of metrics.jsonl as a dict with "kind" (str) and "step" (int, 0 or more), or None if it is none.

    Args:
        line: without its end.
        needs: kind -> keys that a line of it must have: a text for "set", a number or null for any other.
    """
    try:
        record = json.loads(line)
        kind, step = record["kind"], record["step"]
        if not isinstance(kind, str) or type(step) is not int or step < 0:
            return None
        return record if all(_fits(key, record[key]) for key in (needs or {}).get(kind, ())) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _fits(key: str, value: Any) -> bool:
    return isinstance(value, str) if key == "set" else value is None or type(value) in (int, float)


def _lines(path: Path, needs: Mapping[str, Collection[str]] | None = None) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield (record, line) of every metrics line; name the others, but for a last one without an end."""
    *whole, rest = path.read_bytes().split(b"\n")  # in bytes, since a flipped bit makes text that is not UTF-8
    for number, line in enumerate([*whole, rest], start=1):
        record = parse_line(line, needs)
        if record is not None:
            yield record, line
        elif number <= len(whole):
            _name(f"{path}:{number}: not a metrics line, left out")


@functools.cache  # a command reads the file several times
def _name(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def truncate_after(path: Path, step: int, *, evaluate_again: bool = False) -> None:
    """Drop the lines of steps after `step` (the evaluation at it, too), and those that are no metrics lines."""
    if not path.exists():
        return
    kept = [
        line
        for record, line in _lines(path)
        if record["step"] < step + (record["kind"] != "evaluation" or not evaluate_again)
    ]
    write_bytes(path, b"".join(line + b"\n" for line in kept))


def human(value: float) -> str:
    """1234567 -> '1.23 M'."""
    for limit, unit in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g} "


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
