"""Each way in which a line can be no document has its own class."""

from __future__ import annotations

import json

import pytest

from minicpm_megatron.data.records import REASONS, Document, Rejected, parse_json_line, parse_plain

BROKEN = {
    b'{"text": "bad \xff"}': "bad_utf8",
    b'{"text": "overlong \xc0\xaf"}': "bad_utf8",
    b'{"text": "surrogate as bytes \xed\xa0\x80"}': "bad_utf8",
    b'{"text": "\\ud800 lone"}': "lone_surrogate",
    b"5": "not_an_object",
    b"null": "not_an_object",
    b'["text"]': "not_an_object",
    b'"text"': "not_an_object",
    b'{"text": "cut': "invalid_json",
    b'{"text": "a"} trailing': "invalid_json",
    b'{"text": "a", "n": ' + b"1" * 5000 + b"}": "invalid_json",
    b"": "blank_line",
    b" \t\r\n": "blank_line",
    b'{"other": 1}': "missing_key",
    b"[" * 100_000: "too_deep",
    b'{"text":' * 100_000: "too_deep",
    b'{"text": "a", "text": "b"}': "duplicate_key",
    b'{"text": "a", "meta": {"k": 1, "k": 2}}': "duplicate_key",
    b'{"text": "nul \\u0000"}': "nul_character",
    b'{"text": NaN}': "nan_literal",
    b'{"text": "a", "score": -Infinity}': "nan_literal",
    b'{"text": ""}': "empty_text",
    b'{"text": " \\n\\u3000"}': "empty_text",
    b'{"text": 7}': "text_not_string",
    b'{"text": null}': "text_not_string",
    b'{"text": "' + b"x" * 101 + b'"}': "document_too_large",
}


@pytest.mark.parametrize(("line", "reason"), BROKEN.items(), ids=lambda value: str(value)[:40])
def test_broken_line(line: bytes, reason: str) -> None:
    outcome = parse_json_line(line, key="text", max_bytes=100)
    assert isinstance(outcome, Rejected)
    assert outcome.reason == reason
    assert reason in REASONS


@pytest.mark.parametrize("text", ["plain", "数据\n\t", "\U0001f600 pair", " leading", "x\u2028", '"\\'])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_good_line(text: str, ascii_only: bool) -> None:
    line = json.dumps({"id": 1, "text": text}, ensure_ascii=ascii_only).encode() + b"\r\n"
    assert parse_json_line(line, key="text", max_bytes=100) == Document(text, len(text.encode()))


def test_size_limit_counts_bytes_of_text() -> None:
    line = json.dumps({"text": "数" * 3}).encode()
    assert parse_json_line(line, key="text", max_bytes=9) == Document("数数数", 9)
    assert parse_json_line(line, key="text", max_bytes=8) == Rejected("document_too_large", "9 bytes")


def test_plain_file() -> None:
    assert parse_plain(b"a\nb\n", max_bytes=10) == Document("a\nb\n", 4)
    assert parse_plain(b"\xfe\xff", max_bytes=10).reason == "bad_utf8"  # type: ignore[union-attr]
