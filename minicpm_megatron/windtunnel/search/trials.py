"""trials.json: the sets of values that a search has decided on; what they gave stands in their cells.

    {"format", "trials": [{"values": {name: value}, "told": [number]}], "repeated": [number]}

A trial's number is its place in the list, the first is the paper's set. `told` are the trials whose results were known
when it was decided. The file is replaced as a whole, by a process that holds the experiment's lock.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.atomic import write_json
from minicpm_megatron.windtunnel.search.space import PAPER, Values

TRIALS = "trials.json"
_FORMAT = "minicpm_megatron search 1"


@dataclass(frozen=True)
class Trial:
    """A set of values.

    Attributes:
        values: of every axis.
        told: numbers of the trials whose results it was decided from.
    """

    values: Values
    told: tuple[int, ...] = ()


@dataclass(frozen=True)
class Decided:
    """What a search has decided.

    Attributes:
        trials: in the order in which they were.
        repeated: numbers of those that are run with other seeds, too.
    """

    trials: tuple[Trial, ...] = (Trial(PAPER),)
    repeated: tuple[int, ...] = ()


def write_trials(decided: Decided, output: Path) -> None:
    """Replace the file; the caller holds the lock.

    Raises:
        UserError: it cannot be written.
    """
    trials = [{"values": dict(trial.values), "told": list(trial.told)} for trial in decided.trials]
    try:
        write_json(output / TRIALS, {"format": _FORMAT, "trials": trials, "repeated": list(decided.repeated)})
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(output / TRIALS)) from None


def read_trials(output: Path) -> Decided:
    """What is decided in a folder; the paper's set alone where nothing is.

    Raises:
        UserError: the file is not of this form.
    """
    path = output / TRIALS
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != _FORMAT:
            raise ValueError("another format")
        trials = tuple(
            Trial({name: float(each["values"][name]) for name in PAPER}, tuple(map(int, each["told"])))
            for each in content["trials"]
        )
        repeated = tuple(map(int, content["repeated"]))
        if not trials or not set(repeated) <= set(range(len(trials))):
            raise ValueError("a trial is missing")
        if not all(value > 0 and math.isfinite(value) for trial in trials for value in trial.values.values()):
            raise ValueError("a value is not a positive number")
    except (FileNotFoundError, NotADirectoryError):
        return Decided()
    except (OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        fix = "give another --output, or remove the folder"
        raise UserError(f"not of the form {_FORMAT!r}: {error}", where=str(path), fix=fix) from None
    return Decided(trials, repeated)
