"""One run at a time in a folder, and none for ever."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minicpm_megatron.errors import UserError
from minicpm_megatron.storage import lock

HOLDER = "import sys, time, pathlib; from minicpm_megatron.storage import lock; \
held = lock.hold(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"


def test_a_killed_holder_lets_go(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"in use by another process \(pid {holder.pid}\)"):
            lock.hold(tmp_path)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    lock.hold(tmp_path).close()
