"""Killed, interrupted, damaged or changed in between: run again, the bytes are those of an undisturbed run."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from minicpm_megatron.data.metadata import TokenMetadata, read_metadata, verify
from minicpm_megatron.data.preprocess import Options, preprocess
from minicpm_megatron.errors import UserError
from tests.data.conftest import texts, write_jsonl
from tests.data.preprocess_helpers import ENVIRONMENT, TOOL, contents, run


def test_a_complete_output_is_kept_and_another_is_not_overwritten(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run([corpus], tokenizer_dir, tmp_path / "out")
    stamp = Path(f"{tmp_path / 'out'}.bin").stat().st_mtime_ns
    run([corpus], tokenizer_dir, tmp_path / "out")
    assert "complete already" in capfd.readouterr().err
    assert Path(f"{tmp_path / 'out'}.bin").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="exists already"):
        run([corpus], tokenizer_dir, tmp_path / "out", append_eod=False)
    made = preprocess(
        [str(corpus)],
        tokenizer_dir,
        tmp_path / "out",
        options=Options(append_eod=False),
        overwrite=True,
        show_progress=False,
    )
    assert read_metadata(tmp_path / "out") == made
    assert made.eod_id is None


def start_slow_run(source: Path, tokenizer: Path, prefix: Path, workers: int) -> subprocess.Popen[bytes]:
    """The preprocessing in a process of its own, with small units."""
    program = prefix.parent / "slow.py"
    program.write_text(
        "import minicpm_megatron.data.corpus_files as f, minicpm_megatron.data.tokenize_units as u\n"
        "from minicpm_megatron.data.preprocess import preprocess\n"
        "if __name__ == '__main__':\n"
        "    f.SEGMENT_BYTES = u.SEGMENT_BYTES = 20_000\n"
        f"    preprocess([{str(source)!r}], {str(tokenizer)!r}, {str(prefix)!r}, workers={workers},"
        " show_progress=False)\n"
    )
    return subprocess.Popen([sys.executable, str(program)], env=ENVIRONMENT)


@pytest.mark.parametrize("finished", [1, 8])
def test_killed_and_run_again_gives_the_same_bytes(
    tokenizer_dir: Path,
    tmp_path: Path,
    small_units: Callable[[int], None],
    finished: int,
    capfd: pytest.CaptureFixture[str],
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts() * 8)
    small_units(20_000)
    run([source], tokenizer_dir, tmp_path / "undisturbed", 1)
    prefix = tmp_path / "killed"
    work = Path(f"{prefix}.work")
    process = start_slow_run(source, tokenizer_dir, prefix, 2)
    deadline = time.monotonic() + 60
    while len(list(work.glob("unit-*.json"))) < finished and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    marks = {path.name: path.stat().st_mtime_ns for path in work.glob("unit-*.json")}
    assert len(marks) >= finished
    assert not Path(f"{prefix}.json").exists()
    assert not Path(f"{prefix}.bin").exists()
    run([source], tokenizer_dir, prefix, 3)
    assert "going on: " in capfd.readouterr().err
    assert contents(prefix) == contents(tmp_path / "undisturbed")
    assert not work.exists()


def test_interrupted_by_the_user(tokenizer_dir: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts() * 60)
    arguments = ["--input", source, "--tokenizer", tokenizer_dir, "--output-prefix", tmp_path / "out", "--workers", "2"]
    process = subprocess.Popen(
        [*TOOL, *map(str, arguments)],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background job ignores it, and so would all that it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out.work/unit-*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == "interrupted"
    assert not list(tmp_path.glob("out.[!w]*"))
    run([source], tokenizer_dir, tmp_path / "out")
    verify(tmp_path / "out")


def test_leftovers_of_other_inputs_or_options_are_not_reused(
    tokenizer_dir: Path, tmp_path: Path, small_units: Callable[[int], None], capfd: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts(60))
    small_units(5000)
    run([source], tokenizer_dir, tmp_path / "right")
    # an interrupted run with another option leaves all its units
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minicpm_megatron.data.preprocess.join_units", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            run([source], tokenizer_dir, tmp_path / "out", prepend_bos=False)
    assert list(Path(f"{tmp_path / 'out'}.work").glob("unit-*.json"))
    run([source], tokenizer_dir, tmp_path / "out")
    assert "have changed" in capfd.readouterr().err
    assert contents(tmp_path / "out") == contents(tmp_path / "right")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_damaged_part_is_made_again(tokenizer_dir: Path, tmp_path: Path, small_units: Callable[[int], None]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", texts(60))
    small_units(5000)
    run([source], tokenizer_dir, tmp_path / "right")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minicpm_megatron.data.preprocess.join_units", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            run([source], tokenizer_dir, tmp_path / "out")
    part = Path(f"{tmp_path / 'out'}.work") / "unit-00000001.bin"
    part.write_bytes(part.read_bytes()[:-2])
    run([source], tokenizer_dir, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "right")


def test_killed_while_publishing(tokenizer_dir: Path, tmp_path: Path, corpus: Path) -> None:
    run([corpus], tokenizer_dir, tmp_path / "right")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenMetadata, "write", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            run([corpus], tokenizer_dir, tmp_path / "out")
    assert Path(f"{tmp_path / 'out'}.bin").exists()
    run([corpus], tokenizer_dir, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "right")


def test_two_runs_for_one_output(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    work = tmp_path / "out.work"
    work.mkdir()
    descriptor = os.open(work, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another run"):
        run([corpus], tokenizer_dir, tmp_path / "out")
    os.close(descriptor)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_complete_output_that_was_cut_off_is_made_again(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, suffix: str
) -> None:
    run([corpus], tokenizer_dir, tmp_path / "out")
    right = contents(tmp_path / "out")
    Path(f"{tmp_path / 'out'}.{suffix}").write_bytes(right[suffix][:-3])
    run([corpus], tokenizer_dir, tmp_path / "out")
    assert contents(tmp_path / "out") == right
