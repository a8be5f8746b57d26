"""The same bytes whatever happens, Megatron reads them, and every rejected record is accounted for."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minicpm_megatron.data.join_units import rejected_path
from minicpm_megatron.data.megatron_dataset import open_indexed_dataset
from minicpm_megatron.data.metadata import verify
from minicpm_megatron.data.tokenize_units import in_validation
from minicpm_megatron.data.tokenizers.sentencepiece import SentencePieceTokenizer
from minicpm_megatron.errors import UserError
from tests.data.conftest import texts, write_jsonl
from tests.data.preprocess_helpers import ENVIRONMENT, TOOL, contents, run, tool
from tests.data.test_records import BROKEN


def test_tool_makes_what_megatron_reads(
    corpus: Path, tokenizer_dir: Path, tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    done = tool(
        "--input", corpus, "--tokenizer", tokenizer_dir, "--output-prefix", tmp_path / "new" / "p", "--workers", "2"
    )
    assert done.returncode == 0, done.stderr
    reader = open_indexed_dataset(tmp_path / "new" / "p")
    expected = [[1, *tokenizer.processor.encode(text), 2] for text in texts()]
    assert [reader[k].tolist() for k in range(len(reader))] == expected
    made = verify(tmp_path / "new" / "p")
    assert made.text_bytes == sum(len(text.encode()) for text in texts())
    assert (made.documents, made.tokens) == (len(expected), sum(map(len, expected)))
    assert (made.vocab_size, made.max_id, made.dtype) == (tokenizer.vocab_size, max(map(max, expected)), "uint16")
    assert f"{made.tokens:,} tokens" in done.stdout
    assert not (tmp_path / "new" / "p.work").exists()


def _documents(prefix: Path) -> list[list[int]]:
    reader = open_indexed_dataset(prefix)
    return [reader[k].tolist() for k in range(len(reader))]


def test_a_validation_share_divides_the_documents_by_their_text(
    corpus: Path, tokenizer_dir: Path, tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    twice = write_jsonl(tmp_path / "twice.jsonl", [*texts(), *reversed(texts()), ""])
    common = ["--tokenizer", tokenizer_dir, "--workers", "2", "--validation-share", "0.2"]
    done = tool("--input", twice, "--output-prefix", tmp_path / "p", *common)
    assert done.returncode == 0, done.stderr
    train, validation = (_documents(tmp_path / name) for name in ("p", "p.valid"))
    # a document that comes twice is twice on one side
    assert not {tuple(document) for document in train} & {tuple(document) for document in validation}
    every = [[1, *tokenizer.processor.encode(text), 2] for text in texts()] * 2
    assert sorted(train + validation) == sorted(every)
    # of n documents the share has n p (1 - p) as its variance; four deviations
    distinct = len(every) // 2
    assert abs(len(validation) / 2 - 0.2 * distinct) < 4 * (0.16 * distinct) ** 0.5
    # the same documents in other files are on the same sides
    again = tool("--input", corpus, "--output-prefix", tmp_path / "q", *common)
    assert again.returncode == 0, again.stderr
    assert set(map(tuple, _documents(tmp_path / "q.valid"))) == set(map(tuple, validation))
    # what is no document is counted once
    assert (verify(tmp_path / "p").rejected, verify(tmp_path / "p.valid").rejected) == ({"empty_text": 1}, {})
    assert verify(tmp_path / "p.valid").text_bytes + verify(tmp_path / "p").text_bytes == 2 * sum(
        len(text.encode()) for text in texts()
    )


def test_a_validation_share_is_that_of_a_corpus_chosen_by_sha256() -> None:
    """As the sample corpus and many deduplicated ones are: the tenth of the texts with the smallest hashes."""
    chosen = sorted(map(str, range(20_000)), key=lambda text: hashlib.sha256(text.encode()).digest())[:2_000]
    kept = sum(in_validation(text, 0.05) for text in chosen)
    assert abs(kept - 100) < 4 * (2_000 * 0.05 * 0.95) ** 0.5


@pytest.mark.parametrize(
    ("share", "message"),
    [
        ("1", "--validation-share: 1 is no share; give 0.01"),
        ("1e-9", "no document fell into the validation share; check --input and --json-key, or give more"),
    ],
)
def test_a_share_that_leaves_nothing_is_one_line(
    share: str, message: str, corpus: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    done = tool(
        "--input", corpus, "--tokenizer", tokenizer_dir, "--output-prefix", tmp_path / "p", "--validation-share", share
    )
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_formats_and_workers_agree(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, small_units: Callable[[int], None]
) -> None:
    documents = texts()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()))
    pq.write_table(pa.table({"text": documents}), tmp_path / "b.parquet", row_group_size=37)
    small_units(20_000)
    outputs = []
    for number, (source, workers) in enumerate(
        [(corpus, 1), (corpus, 3), (tmp_path / "a.jsonl.gz", 2), (tmp_path / "b.parquet", 2)]
    ):
        run([source], tokenizer_dir, tmp_path / f"out{number}", workers)
        outputs.append(contents(tmp_path / f"out{number}"))
    assert len({(output["bin"], output["idx"]) for output in outputs}) == 1
    assert outputs[0] == outputs[1]


def test_units_of_any_size_give_the_same_tokens(
    tokenizer_dir: Path, tmp_path: Path, small_units: Callable[[int], None]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number, text in enumerate(texts(20)):
        (folder / f"{number:02}.txt").write_text(text, "utf-8")
    write_jsonl(folder / "x.jsonl", texts(60))
    made = []
    for number, size in enumerate((300, 5000, 10**7)):
        small_units(size)
        run([folder], tokenizer_dir, tmp_path / f"out{number}")
        made.append({suffix: content for suffix, content in contents(tmp_path / f"out{number}").items()})
    assert made[0] == made[1] == made[2]


def test_options_reach_the_tokens(tokenizer_dir: Path, tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"body": "one two"}\n')
    ids = tokenizer.encode("one two")
    for bos, eod in ((True, True), (True, False), (False, True), (False, False)):
        prefix = tmp_path / f"out{bos}{eod}"
        made = run([source], tokenizer_dir, prefix, key="body", prepend_bos=bos, append_eod=eod)
        assert (made.bos_id, made.eod_id) == (1 if bos else None, 2 if eod else None)
        reader = open_indexed_dataset(prefix)
        assert reader[0].tolist() == [1] * bos + ids + [2] * eod


def test_rejected_records_are_counted_and_placed(
    tokenizer_dir: Path, tmp_path: Path, small_units: Callable[[int], None], capfd: pytest.CaptureFixture[str]
) -> None:
    lines, expected = [], []
    for number, (line, reason) in enumerate(BROKEN.items()):
        lines += [b'{"text": "good %d"}' % number, line.rstrip(b"\n")]
        expected.append((2 * number + 2, reason))
    source = tmp_path / "in" / "a.jsonl"
    source.parent.mkdir()
    source.write_bytes(b"\n".join(lines))
    (source.parent / "b.jsonl").touch()
    (source.parent / "c.jsonl").symlink_to("c.jsonl")
    small_units(2000)
    made = run([source.parent], tokenizer_dir, tmp_path / "out", 2, max_document_bytes=100)
    entries = [json.loads(line) for line in rejected_path(tmp_path / "out").read_text().splitlines()]
    assert sorted((e["line"], e["reason"]) for e in entries if e["file"] == str(source)) == expected
    assert {(Path(e["file"]).name, e["reason"]) for e in entries if e["file"] != str(source)} == {
        ("b.jsonl", "empty_file"),
        ("c.jsonl", "symlink_loop"),
    }
    assert made.documents == len(BROKEN)
    assert made.documents + sum(made.rejected.values()) == made.records == 2 * len(BROKEN) + 2
    shown = capfd.readouterr().err
    assert f"{source}:2: bad_utf8" in shown
    assert "and 1 more: " in shown  # not_an_object has four


@pytest.mark.parametrize(("line", "reason"), BROKEN.items(), ids=lambda value: str(value)[:40])
def test_fatal_by_flag(
    tokenizer_dir: Path, tmp_path: Path, small_units: Callable[[int], None], line: bytes, reason: str
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(b'{"text": "good"}\n' * 20 + line + b"\n")
    small_units(100)
    from minicpm_megatron.data.corpus_files import segments
    from minicpm_megatron.data.tokenize_units import Setup, make_units, tokenize_unit

    model = SentencePieceTokenizer(tokenizer_dir)
    setup = Setup(str(model.path), "text", 1, 2, "<u2", 100, True, str(tmp_path))
    with pytest.raises(UserError, match=rf"a\.jsonl:21: record rejected \({reason}"):
        for unit in make_units(segments(source)):
            tokenize_unit(unit, setup, model, lambda _: None)


def test_fatal_flag_in_the_tool(tokenizer_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "good"}\nbroken\n')
    arguments = ("--input", source, "--tokenizer", tokenizer_dir, "--output-prefix", tmp_path / "out", "--workers", "1")
    done = tool(*arguments, "--on-error", "fail")
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("error")] == [done.stderr.splitlines()[-1]]
    assert f"{source}:2: record rejected (invalid_json" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out.[!w]*"))
    # what was skipped once is met again when skipping is no longer allowed
    run([source], tokenizer_dir, tmp_path / "out")
    with pytest.raises(UserError, match="1 records rejected"):
        run([source], tokenizer_dir, tmp_path / "out", fail=True)


def test_nothing_but_rejected(tokenizer_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": ""}\nnull\n')
    with pytest.raises(UserError, match=r"a\.jsonl: no document in 2 records \(1 empty_text, 1 not_an_object\)"):
        run([source], tokenizer_dir, tmp_path / "out")
    assert not Path(f"{tmp_path / 'out'}.bin").exists()


def test_full_disk_is_one_line_and_nothing_is_lost(tokenizer_dir: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts())
    limited = (
        f"ulimit -f 20; exec {' '.join(TOOL)} --input {source} --tokenizer {tokenizer_dir} --workers 1"
        f" --output-prefix {tmp_path / 'out'}"
    )
    done = subprocess.run(["bash", "-c", limited], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out.[!w]*"))
    assert not list(tmp_path.rglob("*.part"))
    run([source], tokenizer_dir, tmp_path / "out")
    verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "missing.jsonl"], "missing.jsonl: cannot read the input"),
        (["--tokenizer", "missing"], "missing: no such tokenizer"),
        (["--workers", "0"], "--workers"),
        (["--max-document-bytes", "0"], "--max-document-bytes"),
        (["--output-prefix", "."], "is a folder"),
    ],
)
def test_bad_arguments(corpus: Path, tokenizer_dir: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    given = {"--input": str(corpus), "--tokenizer": str(tokenizer_dir), "--output-prefix": "out"}
    given.update({arguments[0]: arguments[1]})
    done = tool(*[part for pair in given.items() for part in pair], cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_long_document_in_little_memory(tokenizer_dir: Path, tmp_path: Path) -> None:
    """A 200 MB line and many empty records; the process never holds the one or a list of the others."""
    source = tmp_path / "a.jsonl"
    with open(source, "wb") as handle:
        handle.write(b'{"text": "')
        for _ in range(200):
            handle.write(b"x" * 1_000_000)
        handle.write(b'"}\n{"text": "small"}\n')
        handle.write(b'{"text": ""}\n' * 200_000)
    program = (
        "import re, sys; from pathlib import Path\n"
        "from minicpm_megatron.data.corpus_files import segments\n"
        "from minicpm_megatron.data.tokenize_units import Setup, make_units, tokenize_unit\n"
        "from minicpm_megatron.data.tokenizers.sentencepiece import SentencePieceTokenizer\n"
        f"model = SentencePieceTokenizer({str(tokenizer_dir)!r})\n"
        f"setup = Setup(str(model.path), 'text', 1, 2, '<u2', 4 << 20, False, {str(tmp_path)!r})\n"
        # getrusage would begin with the peak of the process that started this one
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "before = peak()\n"
        f"units = make_units(segments(Path({str(source)!r})))\n"
        "done = [tokenize_unit(unit, setup, model, lambda _: None) for unit in units]\n"
        "print(sum(d.documents for d in done), sum(d.records for d in done),"
        " peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    documents, records, kilobytes = map(int, done.stdout.split())
    assert (documents, records) == (1, 200_002)
    assert kilobytes < 40_000


def test_numbers_are_stored_as_megatron_does(tokenizer_dir: Path, tmp_path: Path, corpus: Path) -> None:
    run([corpus], tokenizer_dir, tmp_path / "out")
    assert open_indexed_dataset(tmp_path / "out").index.dtype == np.uint16
