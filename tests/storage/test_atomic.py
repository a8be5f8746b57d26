"""Files that are whole or absent, and folders with one writer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from minicpm_megatron.errors import UserError
from minicpm_megatron.storage import lock
from minicpm_megatron.storage.atomic import atomic_file, write_json

HOLD = """
import sys, time
from pathlib import Path
from minicpm_megatron.storage import lock
held = lock.hold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_an_error_in_the_block_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"é": 1})
    with pytest.raises(KeyError), atomic_file(path) as handle:
        handle.write(b"half")
        raise KeyError
    assert json.loads(path.read_text("utf-8")) == {"é": 1} and list(tmp_path.iterdir()) == [path]


def test_a_folder_in_use_is_refused_until_its_holder_dies(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by another process .pid {holder.pid}."):
            lock.hold(tmp_path)
    finally:
        holder.kill()
        holder.wait()
    lock.hold(tmp_path).close()
