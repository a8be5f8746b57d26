"""Whatever the format and wherever the cuts fall, the same documents come out, and damage is told."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from minicpm_megatron.data.corpus_files import find_files, segments
from minicpm_megatron.data.read_segments import read_segment
from minicpm_megatron.data.records import Document
from minicpm_megatron.errors import UserError
from tests.data.conftest import texts, write_jsonl

MAX_BYTES = 1 << 20


def read(path: Path, max_bytes: int = MAX_BYTES, key: str = "text") -> tuple[list[str], list[tuple[int, str]]]:
    """All documents, and (line within the segment, reason) of everything else."""
    documents, rejected = [], []
    for segment in segments(path):
        progress: list[int] = []
        for record in read_segment(segment, key=key, max_bytes=max_bytes, progress=progress.append):
            if isinstance(record.outcome, Document):
                documents.append(record.outcome.text)
            else:
                rejected.append((record.line, record.outcome.reason))
    return documents, rejected


@pytest.mark.parametrize("size", [1, 7, 64, 1000, 10**6])
def test_every_line_belongs_to_one_segment(tmp_path: Path, small_units: Callable[[int], None], size: int) -> None:
    small_units(size)
    expected = ["a" * n for n in range(1, 60)]
    path = write_jsonl(tmp_path / "a.jsonl", expected)
    assert read(path) == (expected, [])
    assert sum(segment.size for segment in segments(path)) == path.stat().st_size


def test_formats_agree(tmp_path: Path) -> None:
    expected = texts(60)
    plain = write_jsonl(tmp_path / "a.jsonl", expected)
    content = plain.read_bytes()
    half = content.index(b"\n", len(content) // 2) + 1
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content[:half]) + gzip.compress(content[half:]) + b"\0" * 512)
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "c.jsonl.zst").write_bytes(compress(content[: half - 5]) + compress(content[half - 5 :]))
    pq.write_table(pa.table({"id": range(len(expected)), "text": expected}), tmp_path / "d.parquet", row_group_size=9)
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"):
        assert read(tmp_path / name) == (expected, []), name
    assert len(segments(tmp_path / "d.parquet")) == -(-len(expected) // 9)


def test_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\ntwo\n")
    assert read(tmp_path / "a.txt") == (["one\n\ntwo\n"], [])


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_truncated_stream_keeps_what_is_before(tmp_path: Path, kind: str) -> None:
    content = write_jsonl(tmp_path / "a.jsonl", texts(300)).read_bytes()
    packed = gzip.compress(content) if kind == "gz" else zstandard.ZstdCompressor().compress(content)
    path = tmp_path / f"b.jsonl.{kind}"
    path.write_bytes(packed[: len(packed) // 2])
    documents, rejected = read(path)
    assert documents == texts(300)[: len(documents)]
    assert documents or kind == "zst"  # a short zstd file is one block, of which a part gives nothing
    assert rejected == [(len(documents) + 1, "truncated_stream")]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_garbage_is_corrupt(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"this is no such file" * 10)
    documents, rejected = read(tmp_path / name)
    assert not documents
    assert [reason for _, reason in rejected] == ["corrupt_stream"]


def test_flipped_bit_in_gzip_is_corrupt(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(write_jsonl(tmp_path / "a.jsonl", texts(40)).read_bytes()))
    packed[-6] ^= 1  # in the checksum at the end
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    assert read(tmp_path / "a.jsonl.gz")[1][-1][1] == "corrupt_stream"


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_huge_line_is_passed_over(tmp_path: Path, suffix: str) -> None:
    content = b'{"text": "before"}\n{"text": "' + b"x" * 3_000_000 + b'"}\n{"text": "after"}\n'
    pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.ZstdCompressor().compress}[suffix]
    (tmp_path / f"a.{suffix}").write_bytes(pack(content))
    assert read(tmp_path / f"a.{suffix}", max_bytes=1000) == (["before", "after"], [(2, "document_too_large")])


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, suffix: str) -> None:
    content = b'\xef\xbb\xbf{"text": "a"}\n'
    (tmp_path / f"a.{suffix}").write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    assert read(tmp_path / f"a.{suffix}") == (["a"], [])


def test_empty_file_and_missing_column(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    assert read(tmp_path / "a.jsonl") == ([], [(0, "empty_file")])
    pq.write_table(pa.table({"content": ["x"]}), tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet") == ([], [(0, "missing_key")])
    assert read(tmp_path / "b.parquet", key="content") == (["x"], [])


def test_parquet_rows_that_are_no_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None, ""]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == (["a"], [(2, "text_not_string"), (3, "empty_text")])


def test_folders_and_loops(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    write_jsonl(tmp_path / "b" / "x.jsonl", ["x"])
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    (tmp_path / "notes.md").touch()
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "self.jsonl").symlink_to("self.jsonl")
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    files, rejected = find_files([str(tmp_path)])
    assert [path.relative_to(tmp_path).as_posix() for path in files] == ["a.jsonl", "b/x.jsonl"]
    assert sorted((path.name, outcome.reason) for path, outcome in rejected) == [
        ("gone.jsonl", "unreadable_file"),
        ("self.jsonl", "symlink_loop"),
        ("up", "symlink_loop"),
    ]


@pytest.mark.parametrize("name", ["missing.jsonl", "self.jsonl", "notes.md", "."])
def test_unusable_input_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "self.jsonl").symlink_to("self.jsonl")
    (tmp_path / "notes.md").touch()
    if name == ".":
        (tmp_path / "self.jsonl").unlink()
    with pytest.raises(UserError, match="--input|name it"):
        find_files([str(tmp_path / name)])
