"""The command itself: exit status, one line on standard error, nothing half-written."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

from tests.convert.conftest import MakeCheckpoint
from tests.processes.client import run_script

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "convert_checkpoint.py"


def tool(*arguments: object, largest_file: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run tools/convert_checkpoint.py; `largest_file` makes the system refuse to write more bytes to one file."""

    def limit() -> None:
        if largest_file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT)} | dict(os.environ),
        timeout=120,
        preexec_fn=limit,
    )


def test_the_command(checkpoint: MakeCheckpoint, tmp_path: Path, tokenizer: Path) -> None:
    ours, out = checkpoint(), tmp_path / "out"
    done = tool("--input", ours, "--output", out, "--to", "granite", "--tokenizer", tokenizer)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("megatron -> granite: ") and str(out) in done.stdout
    again = run_script(SCRIPT, "--input", ours, "--output", out, "--to", "granite")
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == f"error: {out}: the output folder is not empty; give another one, or --overwrite\n"


def test_a_write_that_fails_in_the_middle(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The system's refusal in the middle of a shard, as on a disk that fills while we write."""
    done = tool("--input", checkpoint(), "--output", tmp_path / "out", "--to", "llama", largest_file=400_000)
    assert (done.returncode, done.stdout) == (2, "")
    assert "bytes are needed" in done.stderr and done.stderr.count("\n") <= 2
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
