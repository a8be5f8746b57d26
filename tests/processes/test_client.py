"""A fork of the server is what a new process is: Python itself is the reference."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from tests.processes.client import importing, libraries, run_call, run_script, with_nothing_imported

SAYS = "import os, sys; print(__name__, sys.argv[1:], os.getcwd(), os.environ.get('X'), sys.stdin.read(), flush=True)\n"
ENDS = {
    "the end": "import helper; print(helper.NAME)",
    "a status": "sys.exit(3)",
    "a status beyond a byte": "sys.exit(258)",
    "a text": "sys.exit('no')",
    "an exception": "raise ValueError('bad')",
    "Ctrl-C": "raise KeyboardInterrupt",
    "a signal": "os.kill(os.getpid(), 15)",
    "a callback": "import atexit; atexit.register(print, 'at exit')",
    "a thread": "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_script_does_what_it_does_under_python(end: str, tmp_path: Path) -> None:
    script, folder = tmp_path / "script.py", tmp_path / "folder"
    folder.mkdir()
    script.write_text(SAYS + ENDS[end])
    (tmp_path / "helper.py").write_text("NAME = 'beside the script'")
    environment = {"X": "1", "PATH": os.environ["PATH"]}
    ours = run_script(script, "a", "b c", environment=environment, cwd=folder)
    words = [sys.executable, str(script), "a", "b c"]
    theirs = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, cwd=folder
    )
    assert (ours.returncode, ours.stdout) == (theirs.returncode, theirs.stdout)
    assert ours.stderr.splitlines()[-1:] == theirs.stderr.splitlines()[-1:]


def leave_a_child() -> None:
    """Print the process id of a child that goes on."""
    print(subprocess.Popen(["sleep", "60"]).pid, flush=True)


def test_nothing_outlives_a_process() -> None:
    assert ends(int(run_call("tests.processes.test_client:leave_a_child").stdout))


def ends(pid: int) -> bool:
    """Whether a process ends within seconds."""
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def sleep() -> None:
    """Stay until killed."""
    time.sleep(60)


def test_a_process_is_signalled_and_waited_for() -> None:
    process = libraries().start("tests.processes.test_client:sleep", {})
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == process.poll() == -signal.SIGTERM


def imported(module: str) -> None:
    """Print whether a module is imported."""
    print(module in sys.modules)


def test_a_process_finds_libraries_imported_and_no_module_of_ours() -> None:
    for module, found in (("deepspeed", "True\n"), ("minicpm_megatron.recipe", "False\n")):
        assert run_call("tests.processes.test_client:imported", module=module).stdout == found


def test_servers_with_more_and_with_nothing_imported() -> None:
    with tempfile.TemporaryFile() as out:
        given = {"module": "minicpm_megatron.recipe"}
        call = "tests.processes.test_client:imported"
        importing("minicpm_megatron.recipe").start(call, given, stdout=out).wait(60)
        with with_nothing_imported(os.environ) as server:
            server.start(call, given, stdout=out).wait(60)
            process = server.start("tests.processes.test_client:sleep", {})
        assert ends(process.pid)  # as the server does
        out.seek(0)
        assert out.read() == b"True\nFalse\n"
