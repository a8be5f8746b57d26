"""What a sentencepiece .model says about itself: pieces with scores and types, and how text is normalised.

The Python interface of sentencepiece tells neither which pieces are user-defined nor the normaliser's settings, and
its generated protobuf classes need another package. The wire format is small, so this reads the few fields we need.
Field numbers are those of sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class PieceType(IntEnum):
    """ModelProto.SentencePiece.Type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """One vocabulary entry; its id is its position."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True)
class ModelDescription:
    """The parts of a ModelProto that decide how text becomes ids.

    Attributes:
        is_bpe: False for unigram, word and character models.
        identity: nothing but spaces is changed before segmentation.
        add_dummy_prefix: a word boundary mark is put before every text.
        remove_extra_whitespaces: runs of spaces are shortened.
    """

    pieces: tuple[Piece, ...]
    is_bpe: bool
    identity: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):  # protobuf writes at most 64 bits
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number without an end")


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of one message: int for varints, bytes for everything else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + length > len(data):
            raise ValueError("cut off")
        yield number, data[at : at + length]
        at += length


def _typed[T: (int, bytes)](message: dict[int, Any], number: int, default: T) -> T:
    """A field of `message`, of the type of `default`, which it has where it is absent."""
    value = message.get(number, default)
    if type(value) is not type(default):
        raise TypeError(f"field {number} has the wrong wire type")
    return value


def parse_model(data: bytes) -> ModelDescription:
    """Read a serialised ModelProto.

    Raises:
        ValueError: `data` is not one.
    """
    try:
        pieces: list[Piece] = []
        trainer: dict[int, Any] = {}
        normalizer: dict[int, Any] = {}
        for number, value in _fields(data):
            if number == 1:
                piece = dict(_fields(value))
                (score,) = struct.unpack("<f", _typed(piece, 2, bytes(4)))
                kind = PieceType(_typed(piece, 3, int(PieceType.NORMAL)))
                pieces.append(Piece(_typed(piece, 1, b"").decode(), score, kind))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
        if not pieces:
            raise ValueError("no pieces")
        return ModelDescription(
            pieces=tuple(pieces),
            is_bpe=_typed(trainer, 3, 1) == 2,
            identity=not _typed(normalizer, 2, b""),
            add_dummy_prefix=bool(_typed(normalizer, 3, 1)),
            remove_extra_whitespaces=bool(_typed(normalizer, 4, 1)),
        )
    except (IndexError, TypeError, ValueError, struct.error) as error:  # of UnicodeDecodeError, too
        raise ValueError(f"not a sentencepiece model: {error}") from error
