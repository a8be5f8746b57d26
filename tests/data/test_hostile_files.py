"""Readers of this room against damaged and hostile files: each gives a value or one line that names the file."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from minicpm_megatron.data.dataset import TokenDataset
from minicpm_megatron.data.indexed_format import bin_path, idx_path, open_index, write_index
from minicpm_megatron.data.metadata import TokenMetadata, json_path, read_metadata
from minicpm_megatron.data.records import Document, Rejected, parse_json_line
from minicpm_megatron.data.retrieval_set import SET, cell_name, open_set
from minicpm_megatron.data.tokenizers.sentencepiece import SentencePieceTokenizer
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.checksum import file_sha256
from minicpm_megatron.storage.sentencepiece_model import parse_model
from tests.hostile import EDITS, EXAMPLES, Changed, Edit, check_line, damaged

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """Three documents of ids below 50, with all three files."""
    prefix = tmp_path / "tokens"
    ids = np.arange(48, dtype="<u2")
    bin_path(prefix).write_bytes(ids.tobytes())
    with open(idx_path(prefix), "wb") as handle:
        write_index(handle, np.dtype("<u2"), 3, [np.array([20, 10, 18], dtype=np.int32)])
    TokenMetadata(
        vocab_size=50,
        max_id=47,
        tokenizer_sha256="0" * 64,
        bos_id=1,
        eod_id=2,
        dtype="uint16",
        documents=3,
        tokens=48,
        text_bytes=100,
        records=3,
        rejected={},
        bin_bytes=96,
        idx_bytes=idx_path(prefix).stat().st_size,
        bin_sha256=file_sha256(bin_path(prefix)),
        idx_sha256=file_sha256(idx_path(prefix)),
        plan="plan",
    ).write(json_path(prefix))
    return prefix


def edit_metadata(prefix: Path, **changes: Any) -> None:
    """Change fields of PREFIX.json as another program would, without its checksum."""
    content = json.loads(json_path(prefix).read_text()) | changes
    content.pop("checksum", None)
    json_path(prefix).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", "50"),
        ("vocab_size", True),
        ("vocab_size", 0),
        ("max_id", 3.5),
        ("max_id", None),
        ("tokenizer_sha256", 7),
        ("tokens", -1),
        ("rejected", []),
        ("rejected", {"bad_utf8": "many"}),
        ("bin_bytes", "96"),
        ("bin_sha256", None),
        ("eod_id", [2]),
    ],
)
def test_a_field_of_the_metadata_of_another_type(field: str, value: Any, prefix: Path) -> None:
    edit_metadata(prefix, **{field: value})
    with pytest.raises(UserError, match=field) as caught:
        TokenDataset(prefix, 4, 0, vocab_size=50, tokenizer_sha256="0" * 64)
    check_line(caught, json_path(prefix))


def test_metadata_without_a_checksum_are_of_an_earlier_release(prefix: Path) -> None:
    before = read_metadata(prefix)
    edit_metadata(prefix)
    assert read_metadata(prefix) == before


def test_every_changed_digit_of_the_metadata_is_found(prefix: Path) -> None:
    content = json_path(prefix).read_bytes()
    digits = [place for place, byte in enumerate(content) if byte in b"0123456789"]
    for place in digits:
        other = b"%d" % ((content[place] - 48 + 1) % 10)
        json_path(prefix).write_bytes(content[:place] + other + content[place + 1 :])
        with pytest.raises(UserError) as caught:
            read_metadata(prefix)
        check_line(caught, json_path(prefix))


@pytest.mark.parametrize(("dtype", "wrong"), [("<u2", 60_000), ("<i4", 60_000), ("<i4", -7)])
def test_an_id_beyond_the_vocabulary_behind_sound_metadata(dtype: str, wrong: int, prefix: Path) -> None:
    """The sizes are the recorded ones, so that only the ids themselves can tell."""
    ids = np.arange(48, dtype=dtype)
    ids[25] = wrong  # of the second document
    bin_path(prefix).write_bytes(ids.tobytes())
    with open(idx_path(prefix), "wb") as handle:
        write_index(handle, np.dtype(dtype), 3, [np.array([20, 10, 18], dtype=np.int32)])
    edit_metadata(prefix, bin_bytes=ids.nbytes, idx_bytes=idx_path(prefix).stat().st_size)
    dataset = TokenDataset(prefix, 47, 0, vocab_size=50)
    with pytest.raises(UserError, match=f"document 1 holds id {wrong}, outside of the vocabulary of 50") as caught:
        dataset[0]  # all of them
    check_line(caught, bin_path(prefix))


@EXAMPLES
@given(edit=EDITS)
def test_metadata_with_any_damage(edit: Edit, prefix: Path) -> None:
    before = read_metadata(prefix)
    with Changed(json_path(prefix)) as path:
        path.write_bytes(damaged(path.read_bytes(), edit))
        try:
            # what can be read is what was written: a change of white space alone does no harm
            assert read_metadata(prefix) == before
        except UserError as error:
            check_line(error, path)


@EXAMPLES
@given(field=st.sampled_from(sorted(TokenMetadata.__dataclass_fields__)), value=JSON)
def test_metadata_with_any_value(field: str, value: Any, prefix: Path) -> None:
    with Changed(json_path(prefix)):
        edit_metadata(prefix, **{field: value})
        try:
            TokenDataset(prefix, 4, 0, vocab_size=50, tokenizer_sha256="0" * 64)[0]
        except UserError as error:
            check_line(error, prefix)


@EXAMPLES
@given(edit=EDITS)
def test_an_index_with_any_damage(edit: Edit, prefix: Path) -> None:
    with Changed(idx_path(prefix)) as path:
        path.write_bytes(damaged(path.read_bytes(), edit))
        try:
            index = open_index(prefix)
            assert index.tokens * index.dtype.itemsize == 96
        except UserError as error:
            check_line(error, prefix)


@EXAMPLES
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_line_is_a_document_or_has_one_reason(line: bytes) -> None:
    assert isinstance(parse_json_line(line, key="text", max_bytes=1000), Document | Rejected)


def field(number: int, wire: int, value: bytes) -> bytes:
    """One field of a protocol buffer; `value` is its encoding."""
    return bytes([number << 3 | wire]) + value


def delimited(number: int, value: bytes) -> bytes:
    assert len(value) < 128
    return field(number, 2, bytes([len(value)]) + value)


@pytest.mark.parametrize(
    "content",
    [
        delimited(1, field(1, 0, b"\x05")),  # a piece's text as a number
        delimited(1, field(1, 5, b"\0\0\0\0")),
        delimited(1, delimited(1, b"a") + field(2, 0, b"\x01")),  # its score as a varint
        delimited(1, delimited(1, b"a") + delimited(3, b"x")),  # its type as text
        field(1, 0, b"\x05"),
        delimited(1, delimited(1, b"a")) + field(2, 0, b"\x05"),  # the trainer's settings as a number
        delimited(1, delimited(1, b"a")) + delimited(2, delimited(3, b"bpe")),
        delimited(1, delimited(1, b"a")) + field(3, 0, b"\x05"),
        delimited(1, delimited(1, b"a")) + delimited(3, field(2, 0, b"\x01")),
        delimited(1, delimited(1, b"a")) + delimited(3, field(3, 5, struct.pack("<f", 1.0))),
        field(1, 0, b"\x80" * 200_000 + b"\x01"),  # a number that takes hours to put together
    ],
    ids=lambda content: content[:12].hex(),
)
def test_a_tokenizer_with_a_wrong_wire_type(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match="not a sentencepiece model") as caught:
        SentencePieceTokenizer(tmp_path)
    check_line(caught, tmp_path / "tokenizer.model")


@EXAMPLES
@given(edit=EDITS)
def test_a_tokenizer_with_any_damage(edit: Edit, tokenizer_dir: Path) -> None:
    content = (tokenizer_dir / "tokenizer.model").read_bytes()
    # in the head are pieces, at the end the settings
    place, patch, growth = edit
    for at in (place % 400, len(content) - 1 - place % 400):
        try:
            assert parse_model(damaged(content, (at, patch, growth))).pieces
        except ValueError:
            pass


def test_a_zst_bomb_takes_little_memory(tmp_path: Path) -> None:
    """256 MiB of zeros in 8 KB, in one read; in a process of its own, whose peak tells."""
    bomb = tmp_path / "bomb.jsonl.zst"
    bomb.write_bytes(zstandard.ZstdCompressor(level=1).compress(bytes(256 << 20)))
    assert bomb.stat().st_size < 1 << 14
    code = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "import zstandard\n"
        "from minicpm_megatron.data.corpus_files import segments\n"
        "from minicpm_megatron.data.read_segments import read_segment\n"
        # getrusage would begin with the peak of the process that started this one
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) >> 10\n"
        "before = peak()\n"
        "records = [record for segment in segments(Path(sys.argv[1]))\n"
        "           for record in read_segment(segment, key='text', max_bytes=1 << 20, progress=lambda size: None)]\n"
        "print(peak() - before, *(record.outcome.reason for record in records))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bomb)], capture_output=True, text=True, check=True)
    grown, *reasons = done.stdout.split()
    assert reasons == ["document_too_large"]
    assert int(grown) < 48  # MiB; the file's content is 256


@EXAMPLES
@given(
    changes=st.dictionaries(
        st.sampled_from(["task", "lengths", "depths", "samples", "seed", "tokenizer_sha256"]), JSON, max_size=2
    )
    | JSON
)
def test_the_description_of_a_retrieval_set_with_any_value(changes: Any, tmp_path: Path) -> None:
    sound = {"task": "passkey", "lengths": [64], "depths": [50.0], "samples": 1, "seed": 0, "tokenizer_sha256": "0"}
    (tmp_path / cell_name(64, 50.0)).touch()
    content = sound | changes if isinstance(changes, dict) else changes
    (tmp_path / SET).write_text(json.dumps(content))
    try:
        assert open_set(tmp_path).task == "passkey"
    except UserError as error:
        check_line(error, tmp_path)
