"""Pickles read as data: a reader that describes what a pickle would build, and imports, calls and builds nothing.

`pickle.load` runs whatever a pickle names. torch's restricted unpickler (`weights_only=True`) reads protocol 2 alone
(torch 2.13), and the `.metadata` file of a torch distributed checkpoint has protocol 4. This reader takes the opcodes
from `pickletools`, which decodes them and does nothing else, and keeps every name as text.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from minicpm_megatron.errors import UserError

PERSISTENT = "persistent id"
_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = {"PROTO", "FRAME"}
# what pickletools and the stack below raise for bytes that are no pickle
_MALFORMED = (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error)


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names: "module.name", as text."""

    text: str


@dataclass(eq=False)  # a key of dictionaries by identity, which is all that is known of it
class Description:
    """An object that unpickling would make.

    Attributes:
        made_by: name of the class or function that would make it, or `PERSISTENT` for what torch.save keeps outside
            of the pickle.
        arguments: what that would be called with.
        state: what the object would then be given; None where there is nothing.
        items: list items, or (key, value) pairs, that would then be added to it.
    """

    made_by: str
    arguments: tuple[Any, ...]
    state: Any = None
    items: list[Any] = field(default_factory=list)


def read_pickle_as_data(content: bytes, allowed: Callable[[str], bool], *, where: str) -> Any:
    """Return a pickle's plain values, lists, dictionaries, sets and tuples, and `Description`s of all other objects.

    Args:
        content: the pickle.
        allowed: whether a name, "module.name", has a place in such a file.
        where: the file, for the error line.

    Raises:
        UserError: it names something that is not allowed, asks for something that this reader does not know, or is no
            whole pickle.
    """
    try:
        return _Machine(allowed, where).run(content)
    except _MALFORMED as error:
        raise UserError(f"not a whole pickle: {error or type(error).__name__}", where=where) from None


class _Machine:
    """The stack, marks and memo of the pickle format."""

    def __init__(self, allowed: Callable[[str], bool], where: str) -> None:
        self._allowed, self._where = allowed, where
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []  # stacks below each mark
        self._memo: dict[Any, Any] = {}

    def run(self, content: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(content):
            name = opcode.name
            if name in _VALUES:
                self._stack.append(argument)
            elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
                self._memo[len(self._memo) if name == "MEMOIZE" else argument] = self._stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                self._stack.append(self._memo[argument])
            elif name == "STOP":
                return self._stack.pop()
            elif name not in _IGNORED:
                self._step(name, argument)
        raise ValueError("no end")  # genops has raised by itself

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            self._outer.append(stack)
            self._stack = []
        elif name == "TUPLE":
            values = tuple(self._since_mark())
            self._stack.append(values)
        elif name in _SHORT_TUPLES:
            count = _SHORT_TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            self._add([stack.pop()] if name == "APPEND" else self._since_mark())
        elif name in ("SETITEM", "SETITEMS"):
            flat = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self._since_mark()
            self._set(zip(flat[::2], flat[1::2], strict=True))
        elif name == "GLOBAL":
            stack.append(self._named(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(self._named(stack.pop(-2), stack.pop()))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, maker = stack.pop(), stack.pop()
            if not isinstance(maker, Name) or not isinstance(arguments, tuple):
                raise ValueError(f"{name} of something that has no name")
            stack.append(Description(maker.text, arguments))
        elif name == "BUILD":
            state = stack.pop()
            if not isinstance(stack[-1], Description):
                raise ValueError("BUILD of a plain value")
            stack[-1].state = state
        elif name == "BINPERSID":
            stack.append(Description(PERSISTENT, (stack.pop(),)))
        else:
            raise UserError(f"asks for {name}, which no checkpoint needs", where=self._where)

    def _named(self, module: Any, name: Any) -> Name:
        text = f"{module}.{name}"
        if not isinstance(module, str) or not isinstance(name, str) or not self._allowed(text):
            raise UserError(
                f"a pickle that names {text[:100]!r}, which has no place in it; nothing was executed",
                where=self._where,
                fix="do not load this file with anything else, and ask whoever made it",
            )
        return Name(text)

    def _since_mark(self) -> list[Any]:
        values, self._stack = self._stack, self._outer.pop()
        return values

    def _add(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Description):
            target.items.extend(values)
        elif isinstance(target, list):
            target.extend(values)
        elif isinstance(target, set):
            target.update(values)
        else:
            raise ValueError("items of something that holds none")

    def _set(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        target = self._stack[-1]
        if isinstance(target, Description):
            target.items.extend(pairs)
        elif isinstance(target, dict):
            target.update(pairs)
        else:
            raise ValueError("items of something that is no dictionary")
