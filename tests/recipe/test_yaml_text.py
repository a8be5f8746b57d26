"""YAML as data: what is read is plain, what could be more is refused with its line."""

from __future__ import annotations

import tracemalloc

import pytest

from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe.yaml_text import parse

BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: !!python/object/apply:os.system [true]\n", r"f:2: the tag .*os.system is not read"),
        ("a: !!str 1\n", "f:1: the tag"),
        (BOMB, "f:1: anchors and aliases are not read"),
        ("a: &x 1\nb: *x\n", "f:1: anchors"),
        ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n", "f:5: the key b.c is given twice, first on line 3"),
        ("[" * 100_000, "f:1: nested more than 32 deep"),
        ("- " * 100_000, "f:1: nested more than 32 deep"),
        ("a: [1\n", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("a: 1\n\tb: 2\n", "f:2: not valid YAML"),
        ("a: '\x00'\n", "f: not valid YAML"),
        ("? [a, b]\n: 1\n", "f:1: a key must be a word"),
        ("a: " + "9" * 10_000, "not valid YAML"),
        ("#" * 1_000_001, "1,000,001 characters"),
    ],
    ids=lambda value: value[:20] if len(value) > 20 else None,
)
def test_refused(text: str, line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        parse(text, source="f")
    assert len(str(caught.value)) < 300


def test_deep_nesting_costs_no_memory() -> None:
    tracemalloc.start()
    with pytest.raises(UserError):
        parse("[" * 500_000, source="f")
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-2", 0.01),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("1_000.5", 1000.5),
        ("010", 10),
        ("1_000_000", 1_000_000),
        ("-3", -3),
        ("no", "no"),
        ("on", "on"),
        ("True", True),
        ("", None),
        ("~", None),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("'1'", "1"),
        ("[1, {a: b}]", [1, {"a": "b"}]),
        ("<<: x", {"<<": "x"}),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    parsed = parse(text, source="f").value
    assert parsed == value
    assert type(parsed) is type(value)


def test_lines_of_every_path() -> None:
    assert parse("a: 1\nb:\n  - c: 2\n  - 3\n", source="f").lines == {"a": 1, "b": 2, "b.0": 3, "b.0.c": 3, "b.1": 4}
