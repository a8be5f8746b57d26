"""Everything that another package may add to, by name: one `Registry` a kind of thing.

A package adds an entry by declaring an entry point in the group of its kind. Nothing is imported until the name is
asked for, so an installed plugin costs nothing to those who do not use it. A plugin that cannot be loaded is refused
in one line that names it, because the recipe that asked for it cannot mean anything else.

The project's own entries come in through the same door. Each kind has a home in the package, so that one file changes
when an entry is added: either a module whose decorators register its entries, or a folder whose files each are one.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from minicpm_megatron.errors import UserError


class Registry[T]:
    """Entries by name: our own, those registered by code, and those of installed packages (entry points).

    Args:
        kind: what an entry is, for error lines ("preset").
        group: the entry-point group that other packages declare theirs in.
        home: the module or folder of our own entries, imported when a name is first asked for. A module registers
            its entries with `register`. In a folder each file is an entry called as the file is, with "-" for "_".
        attribute: what a file of the home folder calls its entry; None: the home is a module.
        validate: "module:function", which turns the loaded object into the entry and raises whatever it likes for one
            that is unfit. It is a name, since the registry lies below every room. An entry with a `name` must be
            registered as that.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        *,
        home: str | None = None,
        attribute: str | None = None,
        validate: str | None = None,
    ) -> None:
        self.kind, self.group = kind, group
        self._home, self._attribute = home, attribute
        self._validator = validate
        self._entries: dict[str, T] = {}
        self._of_plugins: dict[str, T] = {}  # apart, so that a loaded plugin does not pass for one of ours

    def add(self, name: str, entry: T) -> T:
        """Register `entry` as `name`.

        Raises:
            ValueError: the name is taken, so that no later import changes what a recipe means.
        """
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._entries[name] = self._validate(name, entry)
        return entry

    def register(self, name: str) -> Callable[[T], T]:
        """`add` as a decorator."""
        return lambda entry: self.add(name, entry)

    def names(self) -> list[str]:
        """Every known name: ours first in their own order, then the plugins' sorted."""
        known = self._own_names()
        return [*known, *sorted({point.name for point in entry_points(group=self.group)} - set(known))]

    def get(self, name: str) -> T:
        """The entry called `name`, loading the plugin that declares it where it is not ours.

        Raises:
            UserError: nobody declares the name, two packages do, or the plugin that does is broken.
        """
        for loaded in (self._entries, self._of_plugins):
            if name in loaded:  # the usual case, met at every step of a run by schedules
                return loaded[name]
        if name not in self._own_names():
            self._of_plugins[name] = self._load_plugin(name)
            return self._of_plugins[name]
        if name not in self._entries:
            self.add(name, self._load_own(name))
        return self._entries[name]

    def loadable(self, broken: list[str]) -> Iterator[T]:
        """The entries that can be loaded, one at a time, ours first, for whoever looks for one that fits.

        A package whose entry cannot be loaded disturbs nobody who did not ask for it.

        Args:
            broken: gets a line for each such package.
        """
        for name in self.names():
            try:
                yield self.get(name)
            except UserError as error:
                broken.append(error.what)

    def check(self, name: str, *, where: str) -> None:
        """Refuse a name that nobody declares, without loading a plugin.

        Raises:
            UserError: the name is unknown; the line names the nearest known one.
        """
        if name in self._own_names():
            return  # the usual case, without a search through the installed packages
        known = self.names()
        if name in known:
            return
        nearest = difflib.get_close_matches(name.lower(), known, n=1)
        fix = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"
        raise UserError(f"unknown {self.kind} {name!r}", where=where, fix=fix)

    def _own_names(self) -> list[str]:
        if self._home is not None and self._attribute is None:
            importlib.import_module(self._home)
        return list(dict.fromkeys((*self._files, *self._entries)))

    @cached_property
    def _files(self) -> list[str]:
        """Names of the entries in a home folder."""
        if self._home is None or self._attribute is None:
            return []
        spec = importlib.util.find_spec(self._home)
        places = spec.submodule_search_locations if spec is not None else None
        return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(places))

    def _load_own(self, name: str) -> Any:
        module = importlib.import_module(f"{self._home}.{name.replace('-', '_')}")
        return getattr(module, str(self._attribute))

    def _validate(self, name: str, entry: Any) -> T:
        if self._validator is not None:
            module, function = self._validator.split(":")
            entry = getattr(importlib.import_module(module), function)(entry)
        if getattr(entry, "name", name) != name:
            raise ValueError(f"the {self.kind} calls itself {entry.name!r}")
        checked: T = entry
        return checked

    def _load_plugin(self, name: str) -> T:
        points = list(entry_points(group=self.group, name=name))
        if not points:
            self.check(name, where="")
        owners = sorted({_owner(point) for point in points})
        if len(owners) > 1:
            raise UserError(
                f"{self.kind} {name!r} is provided by {' and '.join(owners)}", fix="uninstall all but one of them"
            )
        try:
            return self._validate(name, points[0].load())
        # a plugin may fail in any way at all, or leave; whichever it is, the plugin is to name
        except (Exception, SystemExit) as error:
            raise UserError(
                f"plugin {owners[0]} cannot provide the {self.kind} {name!r} ({points[0].value}):"
                f" {type(error).__name__}: {error}",
                fix="repair or uninstall that package",
            ) from error


class Entries[T](Mapping[str, T]):
    """A registry as a read-only mapping; entries of other packages are loaded when they are read."""

    def __init__(self, registry: Registry[T]) -> None:
        self._registry = registry

    def __getitem__(self, name: str) -> T:
        if name not in self:
            raise KeyError(name)
        return self._registry.get(name)

    def __contains__(self, name: object) -> bool:
        return name in self._registry.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self._registry.names())

    def __len__(self) -> int:
        return len(self._registry.names())


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


PRESETS: Registry[Any] = Registry(
    "preset",
    "minicpm_megatron.presets",
    home="minicpm_megatron.recipe.presets",
    validate="minicpm_megatron.recipe.presets:as_model",
)
DECAY_SHAPES: Registry[Any] = Registry(
    "decay shape",
    "minicpm_megatron.decay_shapes",
    home="minicpm_megatron.methods.decay_shapes",
    validate="minicpm_megatron.methods.decay_shapes:as_decay_shape",
)
ATTENTION_KERNELS: Registry[Any] = Registry(
    "attention kernel",
    "minicpm_megatron.attention_kernels",
    home="minicpm_megatron.model.attention_kernels",
    attribute="KERNEL",
    validate="minicpm_megatron.model.attention_kernel:as_kernel",
)
SCHEDULES: Registry[Any] = Registry(
    "schedule",
    "minicpm_megatron.schedules",
    home="minicpm_megatron.methods.schedules",
    validate="minicpm_megatron.methods.schedule:as_schedule",
)
FORMATS: Registry[Any] = Registry(
    "export format",
    "minicpm_megatron.formats",
    home="minicpm_megatron.convert.formats",
    attribute="FORMAT",
    validate="minicpm_megatron.convert.format:as_format",
)
TOKENIZERS: Registry[Any] = Registry(
    "tokenizer",
    "minicpm_megatron.tokenizers",
    home="minicpm_megatron.data.tokenizers",
    attribute="TOKENIZER",
    validate="minicpm_megatron.data.tokenizers:as_tokenizer",
)
OPTIMIZERS: Registry[Any] = Registry(
    "optimizer",
    "minicpm_megatron.optimizers",
    home="minicpm_megatron.engine.optimizers",
    attribute="OPTIMIZER",
    validate="minicpm_megatron.recipe.optimizer:as_optimizer",
)
OBSERVERS: Registry[Any] = Registry(
    "observer",
    "minicpm_megatron.observers",
    home="minicpm_megatron.training.observers",
    attribute="OBSERVER",
    validate="minicpm_megatron.training.observer:as_factory",
)
OBJECTIVES: Registry[Any] = Registry(
    "objective",
    "minicpm_megatron.objectives",
    home="minicpm_megatron.training.objectives",
    attribute="OBJECTIVE",
    validate="minicpm_megatron.training.objective:as_factory",
)
