"""YAML as data and nothing else, with the line every key came from.

PyYAML's safe loader is the base, narrowed to what a recipe needs. Refused: tags, anchors and aliases (with them
goes the alias bomb), duplicate keys, deep nesting, several documents. Scalars follow YAML 1.2's core schema, so
that `no` is a word and `1e-2` is a number, which YAML 1.1 has the other way round.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from minicpm_megatron.errors import UserError

MAX_CHARACTERS = 1_000_000
MAX_DEPTH = 32


class _CoreLoader(yaml.SafeLoader):
    """The safe loader with YAML 1.2's scalars and no others."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9]+(?:_[0-9]+)*$", "-+0123456789"),
    (
        "float",
        r"^(?:[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$",
        "-+0123456789.",
    ),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
):
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))  # YAML 1.1's reading of a leading 0 as octal would be a surprise


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(str(loader.construct_scalar(node)).replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))


_CoreLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_CoreLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)


@dataclass(frozen=True)
class Document:
    """A parsed text: its value (dicts, lists, scalars) and, for each dotted path in it, the line (from 1)."""

    value: Any
    lines: dict[str, int] = field(default_factory=dict)


def read(path: Path, what: str) -> Document:
    """`parse` of a file; `what` it is goes into the error line: "the recipe".

    Raises:
        UserError: the file cannot be read, or as `parse`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text (byte {error.start})", where=str(path)) from None
    except OSError as error:
        raise UserError(f"cannot read {what}: {error.strerror}", where=str(path)) from None
    return parse(text, source=str(path))


def parse(text: str, *, source: str) -> Document:
    """Read one YAML document.

    Args:
        text: the document, at most MAX_CHARACTERS long.
        source: file or argument it came from, for error lines.

    Raises:
        UserError: the text is not YAML, or uses something that a recipe may not; with `source:line`.
    """
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{len(text):,} characters of YAML", where=source, fix=f"keep it below {MAX_CHARACTERS:,}")
    try:
        _refuse_dangerous(text, source)
        loader = _CoreLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return Document(None)
            lines: dict[str, int] = {}
            return Document(_value(loader, node, "", lines, source), lines)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}" if mark else source
        raise UserError(f"not valid YAML: {error.problem or error.context}", where=place) from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"not valid YAML: {error}", where=source) from None


def _refuse_dangerous(text: str, source: str) -> None:
    """Walk the event stream, which needs neither recursion nor memory, before anything is built from it."""
    depth = 0
    for event in yaml.parse(text, Loader=_CoreLoader):
        where = f"{source}:{event.start_mark.line + 1}" if event.start_mark else source
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise UserError("anchors and aliases are not read", where=where, fix="write the value out")
        tag = getattr(event, "tag", None)
        if tag:
            raise UserError(f"the tag {tag} is not read", where=where, fix="write a plain value")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise UserError(f"nested more than {MAX_DEPTH} deep", where=where)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _value(loader: _CoreLoader, node: yaml.Node, path: str, lines: dict[str, int], source: str) -> Any:
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError("a key must be a word", where=f"{source}:{line}")
            key = str(key_node.value)
            inner = f"{path}.{key}" if path else key
            if key in mapping:
                raise UserError(
                    f"the key {inner} is given twice, first on line {lines[inner]}",
                    where=f"{source}:{line}",
                    fix="remove one",
                )
            lines[inner] = line
            mapping[key] = _value(loader, value_node, inner, lines, source)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            inner = f"{path}.{index}" if path else str(index)
            lines[inner] = item.start_mark.line + 1
            items.append(_value(loader, item, inner, lines, source))
        return items
    return loader.construct_object(node)


_YAML_1_1 = yaml.SafeDumper.yaml_implicit_resolvers


class CoreDumper(yaml.SafeDumper):
    """Writes what `parse` reads back equal, and quotes what a YAML 1.1 reader would take for something else too."""

    yaml_implicit_resolvers = {
        first: [*_YAML_1_1.get(first, []), *_CoreLoader.yaml_implicit_resolvers.get(first, [])]
        for first in {*_YAML_1_1, *_CoreLoader.yaml_implicit_resolvers}
    }

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        """Lists of plain values on one line, everything else one entry a line."""
        plain = all(not isinstance(item, (dict, list)) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=plain)

    def ignore_aliases(self, data: Any) -> bool:
        return True
