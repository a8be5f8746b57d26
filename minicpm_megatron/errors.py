"""The one exception a user is meant to read.

Every public command turns a `UserError` into one line on standard error and exit status 2 (`cli.entry`).
Anything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

from typing import Any


class UserError(Exception):
    """Input that we refuse: what is wrong, where, and what to do about it, in one line.

    Args:
        what: the fault, as a short clause without a trailing full stop.
        where: the file (with line), dotted recipe key or argument it was found in.
        fix: what the user can do, as an imperative clause.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        line = what if not where else f"{where}: {what}"
        super().__init__(" ".join((line if not fix else f"{line}; {fix}").split()))

    def __reduce__(
        self,
    ) -> tuple[Any, ...]:  # keyword-only arguments are lost by the default pickling across worker processes
        return _rebuild, (self.what, self.where, self.fix)


def require(holds: bool, where: str, what: str, fix: str = "") -> None:
    """Raise UserError(what, where=where, fix=fix) unless `holds`."""
    if not holds:
        raise UserError(what, where=where, fix=fix)


def shorten(value: object, characters: int = 60) -> str:
    """A refused value as an error line repeats it, cut to so many characters."""
    text = repr(value)
    return text if len(text) <= characters else text[:characters] + "..."


def _rebuild(what: str, where: str, fix: str) -> UserError:
    return UserError(what, where=where, fix=fix)
