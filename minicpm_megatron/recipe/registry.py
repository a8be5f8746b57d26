"""Named things that other packages may add to: presets and decay shapes.

A package adds an entry by declaring an entry point in one of the groups below; nothing is imported until the
name is asked for, so an installed plugin costs nothing to those who do not use it. A plugin that cannot be
loaded is refused in one line that names it, because the recipe that asked for it cannot mean anything else.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from minicpm_megatron.errors import UserError

PRESET_GROUP = "minicpm_megatron.presets"
DECAY_SHAPE_GROUP = "minicpm_megatron.decay_shapes"

T = TypeVar("T")


class Registry[T]:
    """Entries by name: our own, those registered by code, and those of installed packages (entry points).

    Args:
        kind: what an entry is, for error lines ("preset").
        group: the entry-point group that other packages declare theirs in.
        own: names that the project itself registers. They are known before the module that registers them is
            imported, so that a recipe can be validated without importing torch.
        validate: turns the loaded object into the entry; raises whatever it likes for one that is unfit.
    """

    def __init__(
        self, kind: str, group: str, *, own: Iterable[str] = (), validate: Callable[[Any], T] | None = None
    ) -> None:
        self.kind, self.group = kind, group
        self._own = tuple(own)
        self._entries: dict[str, T] = {}
        self._validate = validate or (lambda entry: entry)

    def add(self, name: str, entry: T) -> T:
        """Register `entry` as `name`.

        Raises:
            ValueError: the name is taken, so that no later import changes what a recipe means.
        """
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._entries[name] = self._validate(entry)
        return entry

    def register(self, name: str) -> Callable[[T], T]:
        """`add` as a decorator."""
        return lambda entry: self.add(name, entry)

    def names(self) -> list[str]:
        """Every known name: ours first in their own order, then the plugins' sorted."""
        known = dict.fromkeys((*self._own, *self._entries))
        return [*known, *sorted({point.name for point in entry_points(group=self.group)} - set(known))]

    def get(self, name: str) -> T:
        """The entry called `name`, loading the plugin that declares it where it is not ours.

        Raises:
            UserError: nobody declares the name, two packages do, or the plugin that does is broken.
        """
        if name not in self._entries:
            self.add(name, self._load(name))
        return self._entries[name]

    def check(self, name: str, *, where: str) -> None:
        """Refuse a name that nobody declares, without loading anything.

        Raises:
            UserError: the name is unknown; the line names the nearest known one.
        """
        if name in self._own or name in self._entries:
            return  # the usual case, without a search through the installed packages
        known = self.names()
        if name in known:
            return
        nearest = difflib.get_close_matches(name.lower(), known, n=1)
        fix = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"
        raise UserError(f"unknown {self.kind} {name!r}", where=where, fix=fix)

    def _load(self, name: str) -> T:
        points = list(entry_points(group=self.group, name=name))
        if not points:
            self.check(name, where="")
            raise LookupError(f"{self.kind} {name!r} is declared as ours but its module was not imported")
        owners = sorted({_owner(point) for point in points})
        if len(owners) > 1:
            raise UserError(
                f"{self.kind} {name!r} is provided by {' and '.join(owners)}", fix="uninstall all but one of them"
            )
        try:
            return self._validate(points[0].load())
        # a plugin may fail in any way at all, or leave; whichever it is, the plugin is to name
        except (Exception, SystemExit) as error:
            raise UserError(
                f"plugin {owners[0]} cannot provide the {self.kind} {name!r} ({points[0].value}):"
                f" {type(error).__name__}: {error}",
                fix="repair or uninstall that package",
            ) from error


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def _function(entry: Any) -> Any:
    if not callable(entry):
        raise TypeError(f"a decay shape must be a function, not {type(entry).__name__}")
    return entry


DECAY_SHAPES: Registry[Any] = Registry(
    "decay shape",
    DECAY_SHAPE_GROUP,
    own=("exponential", "linear", "cosine", "1-sqrt", "megatron-exponential"),
    validate=_function,
)
