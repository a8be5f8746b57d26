"""Test processes that need not import the libraries: forks of a server that has (server.py).

    process = libraries().start("tests.model.test_x:worker", {"step": 3}, stdout=log)   # a function
    done = run_script("tools/convert_checkpoint.py", "--input", folder)                 # like subprocess.run
    importing("tests.model.test_x").start(...)                                           # which is imported, too

A pytest process starts its server when a test first wants one; it ends with the pytest process, however that ends, and
its processes with it. What is about the start of Python, about its options, or about modules that are not imported,
wants a real process: `python -m` costs 5 CPU-seconds, where it imports DeepSpeed and Megatron-Core, and a fork 0.05.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from tests.device import on_cuda
from tests.processes.server import LENGTH

REPOSITORY = Path(__file__).resolve().parents[2]
# What the project imports of others. None of its own modules: a fork imports them as a new process does.
LIBRARIES = (
    "deepspeed",
    "megatron.core.dist_checkpointing",
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.hybrid.hybrid_model",
    "megatron.core.optimizer",
    "psutil",
    "pydantic",
    "pytest",
    "safetensors.torch",
    "sentencepiece",
    "yaml",
)
START_TIMEOUT = 180.0
MOST_SERVERS = 2  # of those that have imported a module, at once


class Process:
    """A process that a server has forked, to its client what subprocess.Popen is."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.answers = connection, connection.makefile("rb")
        self.returncode: int | None = None
        self.pid = int(json.loads(self.answers.readline())["pid"])

    def poll(self) -> int | None:
        """Exit status, or the negative number of the signal that ended it; None while it runs."""
        if self.returncode is None and select.select([self.connection], [], [], 0)[0]:
            self._end()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Exit status.

        Raises:
            subprocess.TimeoutExpired: it runs after so many seconds.
        """
        if self.returncode is None:
            if not select.select([self.connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            self._end()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to the process, unless it has ended."""
        if self.poll() is None:
            self.connection.sendall(bytes([number]))

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _end(self) -> None:
        line = self.answers.readline()
        assert line, "the server of test processes has ended"
        self.returncode = int(json.loads(line)["status"])
        self.answers.close()
        self.connection.close()


class Server:
    """A server's address, and what there is to ask of it."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def start(
        self,
        call: str,
        arguments: dict[str, Any],
        *,
        environment: Mapping[str, str] | None = None,
        cwd: str | Path = REPOSITORY,
        stdin: int | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
    ) -> Process:
        """Start a process that calls the function "module:name" with keyword arguments that JSON can hold.

        Args:
            environment: all of it (default: this process's).
            stdin, stdout, stderr: descriptors or files (default: nothing to read; nowhere; where stdout goes).
        """
        return self._start({"call": call, "arguments": arguments}, environment, cwd, stdin, stdout, stderr)

    def start_script(
        self,
        path: str | Path,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        cwd: str | Path = REPOSITORY,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
    ) -> Process:
        """`start` of `python PATH ARGUMENTS`."""
        given = {"script": str(path), "arguments": [str(argument) for argument in arguments]}
        return self._start(given, environment, cwd, None, stdout, stderr)

    def _start(
        self,
        request: dict[str, Any],
        environment: Mapping[str, str] | None,
        cwd: str | Path,
        stdin: int | None,
        stdout: int | IO[Any] | None,
        stderr: int | IO[Any] | None,
    ) -> Process:
        variables = dict(os.environ if environment is None else environment)
        request |= {"environment": variables, "cwd": str(cwd), "journal": None}
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self.place))
        with open(os.devnull, "r+b") as nothing:
            out = nothing if stdout is None else stdout
            streams = (nothing if stdin is None else stdin, out, out if stderr is None else stderr)
            numbers = [each if isinstance(each, int) else each.fileno() for each in streams]
            body = json.dumps(request).encode()
            socket.send_fds(connection, [len(body).to_bytes(LENGTH, "big")], numbers)
            connection.sendall(body)
        return Process(connection)


class _Started:
    """A server and what keeps it alive: the end of a pipe that is its standard input."""

    def __init__(self, start: Callable[[Path, int, IO[bytes]], Process | subprocess.Popen[bytes]]) -> None:
        self.scratch = Path(tempfile.mkdtemp(prefix="server-"))
        place, log = self.scratch / "socket", self.scratch / "log"
        lifeline, self.held = os.pipe()
        try:
            with open(log, "wb") as output:
                self.process = start(place, lifeline, output)
        finally:
            os.close(lifeline)
        end = time.monotonic() + START_TIMEOUT
        while not place.exists():
            assert self.process.poll() is None and time.monotonic() < end, log.read_text(errors="replace")
            time.sleep(0.005)
        self.server = Server(place)

    def end(self) -> None:
        os.close(self.held)
        self.process.wait(START_TIMEOUT)
        shutil.rmtree(self.scratch, ignore_errors=True)


def _new(environment: Mapping[str, str], modules: Sequence[str]) -> _Started:
    def start(place: Path, lifeline: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.processes.server", str(place), *modules],
            cwd=REPOSITORY,
            env={**environment, "OMP_NUM_THREADS": "1"},
            stdin=lifeline,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    return _Started(start)


@functools.cache
def libraries() -> Server:
    """The server of this pytest process, which has imported `LIBRARIES`."""
    # on a GPU a child cannot use what importing DeepSpeed has used in its parent
    started = _new(os.environ, () if on_cuda() else LIBRARIES)
    atexit.register(_end, started)
    return started.server


def _end(root: _Started) -> None:
    for started in (*_importing.values(), root):
        started.end()


_importing: dict[str, _Started] = {}


def importing(module: str) -> Server:
    """A server that has imported a module, too. It ends when `MOST_SERVERS` others have been asked for since."""
    started = _importing.pop(module, None)
    if started is None:
        if len(_importing) == MOST_SERVERS:
            _importing.pop(next(iter(_importing))).end()

        def start(place: Path, lifeline: int, log: IO[bytes]) -> Process:
            given = {"place": str(place), "modules": [] if on_cuda() else [module]}
            return libraries().start("tests.processes.server:serve", given, stdin=lifeline, stdout=log)

        started = _Started(start)
    _importing[module] = started  # now the last to go
    return started.server


@contextlib.contextmanager
def with_nothing_imported(environment: Mapping[str, str]) -> Iterator[Server]:
    """A server that has imported nothing, for what decides by the environment when it is imported."""
    started = _new(environment, ())
    try:
        yield started.server
    finally:
        started.end()


def run_script(
    path: str | Path,
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    cwd: str | Path = REPOSITORY,
    timeout: float = 200.0,
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run([python, PATH, *ARGUMENTS], capture_output=True, text=True)` as a fork."""

    def start(out: IO[bytes], err: IO[bytes]) -> Process:
        return libraries().start_script(path, *arguments, environment=environment, cwd=cwd, stdout=out, stderr=err)

    return _run([str(path), *map(str, arguments)], start, timeout)


def run_call(
    call: str, *, environment: Mapping[str, str] | None = None, timeout: float = 200.0, **arguments: Any
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of a process that calls the function "module:name" with the keyword arguments."""

    def start(out: IO[bytes], err: IO[bytes]) -> Process:
        return libraries().start(call, arguments, environment=environment, stdout=out, stderr=err)

    return _run([call], start, timeout)


def _run(
    words: list[str], start: Callable[[IO[bytes], IO[bytes]], Process], timeout: float
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = start(out, err)
        try:
            status = process.wait(timeout)
        finally:
            process.kill()
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
    return subprocess.CompletedProcess(words, status, *texts)
