"""One line or row of a corpus: either a document or a named reason why it is not one.

A corpus of a billion lines always holds some that are broken. Each gets exactly one class from `REASONS`, so that
documents + rejected = records holds to the last line, and nothing is dropped without a trace.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

REASONS: dict[str, str] = {
    "bad_utf8": "bytes that are not UTF-8",
    "invalid_json": "not a JSON value (cut off, trailing text, a number too long)",
    "too_deep": "nested deeper than the parser allows",
    "duplicate_key": "an object names the same key twice",
    "nan_literal": "NaN or Infinity, which JSON does not have",
    "not_an_object": "a JSON value, but not an object",
    "missing_key": "the object lacks the text key",
    "text_not_string": "the text is not a string",
    "lone_surrogate": "half of a surrogate pair, which no UTF-8 can hold",
    "nul_character": "a NUL character, the mark of binary data",
    "empty_text": "no text, or only white space",
    "blank_line": "a line without a record",
    "document_too_large": "longer than --max-document-bytes",
    "empty_file": "a file of 0 bytes",
    "truncated_stream": "a compressed file that ends too early",
    "corrupt_stream": "a file whose compression or columns are damaged",
    "unreadable_file": "a file that cannot be opened",
    "symlink_loop": "a link that leads back to itself",
}
"""Class of a rejected record -> what it means."""

_JSON_SPACE = b" \t\r\n"


@dataclass(frozen=True)
class Document:
    """Text that goes to the tokenizer.

    Attributes:
        text: never empty, valid Unicode.
        size: bytes of `text` in UTF-8.
    """

    text: str
    size: int


@dataclass(frozen=True)
class Rejected:
    """Why a record is no document.

    Attributes:
        reason: a key of `REASONS`.
        detail: what exactly was found, one short line.
    """

    reason: str
    detail: str = ""


class _Refusal(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def max_line_bytes(max_document_bytes: int) -> int:
    """Longest line of JSON that is looked at for a document of that size.

    A byte of text takes up to six in an escape, but hardly ever all of a text's do; and other members need room.
    """
    return 2 * max_document_bytes + (1 << 20)


def _constant(name: str) -> Any:
    raise _Refusal("nan_literal", name)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise _Refusal("duplicate_key", repr(twice)[:80])
    return value


# one decoder for all lines: json.loads with hooks would build a new one for each
_DECODER = json.JSONDecoder(parse_constant=_constant, object_pairs_hook=_object)


def check_text(text: Any, *, max_bytes: int) -> Document | Rejected:
    """Accept `text` as a document of at most `max_bytes` UTF-8 bytes, or say why not."""
    if not isinstance(text, str):
        return Rejected("text_not_string", type(text).__name__)
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        return Rejected("lone_surrogate", f"character {error.start}")
    if size > max_bytes:
        return Rejected("document_too_large", f"{size} bytes")
    if "\0" in text:
        return Rejected("nul_character", f"character {text.index(chr(0))}")
    if not text.strip():
        return Rejected("empty_text")
    return Document(text, size)


def parse_json_line(line: bytes, *, key: str, max_bytes: int) -> Document | Rejected:
    """The document in one line of JSON Lines, whose object holds the text under `key`."""
    if not line.strip(_JSON_SPACE):
        return Rejected("blank_line")
    try:
        value = _DECODER.decode(line.strip(_JSON_SPACE).decode())
    except UnicodeDecodeError as error:
        return Rejected("bad_utf8", f"byte {error.start}: {error.reason}")
    except _Refusal as error:
        return Rejected(error.reason, str(error))
    except RecursionError:
        return Rejected("too_deep")
    except ValueError as error:  # JSONDecodeError, and integers longer than Python converts
        return Rejected("invalid_json", str(error)[:120])
    if not isinstance(value, dict):
        return Rejected("not_an_object", type(value).__name__)
    if key not in value:
        return Rejected("missing_key", repr(key))
    return check_text(value[key], max_bytes=max_bytes)


def parse_plain(content: bytes, *, max_bytes: int) -> Document | Rejected:
    """The document that a whole plain-text file is."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        return Rejected("bad_utf8", f"byte {error.start}: {error.reason}")
    return check_text(text, max_bytes=max_bytes)
