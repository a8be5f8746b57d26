"""Server side of the test processes: a process that has imported the libraries and forks one process a request.

`python -m tests.processes.server SOCKET MODULE...` imports the modules, then listens. A request is a JSON object, sent
with three descriptors that become the new process's standard input, output and error:

    call, arguments     a function "module:name", and its keyword arguments
    script, arguments   a Python file that runs as `python FILE ARGUMENTS` would run it
    environment, cwd    of the new process
    journal             a file to which a line about the process is added once it has ended; null: none

The answer is {"pid": ...}, and {"status": ...} once the process has ended. On the same connection a client sends bytes
that are numbers of signals for the process. A connection that closes kills the process and its process group; the end
of the server's standard input ends the server and all that it has forked.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

LENGTH = 8  # bytes of the number before a request
_PARENT_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG


@dataclass(frozen=True)
class _Child:
    """A forked process, and who asked for it."""

    pid: int
    ended: int  # a pidfd: readable once the process has ended
    connection: socket.socket
    request: dict[str, Any]
    began: float


class _Server:
    def __init__(self, place: str) -> None:
        self.selector = selectors.DefaultSelector()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(place + ".new")
        self.listener.listen(64)
        os.rename(place + ".new", place)  # whoever sees it can connect
        self.selector.register(self.listener, selectors.EVENT_READ, self._accept)
        self.selector.register(0, selectors.EVENT_READ, self._end)
        self.children: dict[int, _Child] = {}

    def run(self) -> NoReturn:
        while True:
            for key, _ in self.selector.select():
                if key.fd in self.selector.get_map():  # what came before may have closed it
                    key.data()

    def _end(self) -> NoReturn:
        for child in self.children.values():
            _kill_group(child.pid)
        os._exit(0)

    def _accept(self) -> None:
        connection, _ = self.listener.accept()
        try:
            request, descriptors = _receive(connection)
        except (OSError, ValueError):
            connection.close()
            return
        began, pid = time.monotonic(), os.fork()
        if pid == 0:
            # nothing below may return into the server's loop
            try:
                self._leave(connection)
                _become(request, descriptors)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        for descriptor in descriptors:
            os.close(descriptor)
        child = _Child(pid, os.pidfd_open(pid), connection, request, began)
        self.children[pid] = child
        self.selector.register(child.ended, selectors.EVENT_READ, functools.partial(self._reap, child))
        self.selector.register(connection, selectors.EVENT_READ, functools.partial(self._pass_on, child))
        _answer(connection, {"pid": pid})

    def _leave(self, connection: socket.socket) -> None:
        """Close in a forked process what is the server's."""
        connection.close()
        self.listener.close()
        for child in self.children.values():
            child.connection.close()
            os.close(child.ended)
        self.selector.close()

    def _pass_on(self, child: _Child) -> None:
        try:
            numbers = child.connection.recv(64)
        except OSError:
            numbers = b""
        for number in numbers:
            signal.pidfd_send_signal(child.ended, number)
        if not numbers:
            self.selector.unregister(child.connection)
            _kill_group(child.pid)

    def _reap(self, child: _Child) -> None:
        _kill_group(child.pid)  # what it left behind; it is not reaped yet, so that the number is still its own
        status = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
        del self.children[child.pid]
        for each in (child.ended, child.connection):
            with contextlib.suppress(KeyError):
                self.selector.unregister(each)
        os.close(child.ended)
        if child.request["journal"] is not None:
            line = {"arguments": child.request["arguments"], "cwd": child.request["cwd"], "status": status}
            with open(child.request["journal"], "a") as handle:
                handle.write(json.dumps(line | {"began": child.began, "ended": time.monotonic()}) + "\n")
        _answer(child.connection, {"status": status})
        child.connection.close()


def _kill_group(pid: int) -> None:
    for kill in (os.killpg, os.kill):  # a process that was forked just now leads no group yet
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def _answer(connection: socket.socket, value: dict[str, int]) -> None:
    with contextlib.suppress(OSError):  # the client has gone
        connection.sendall(json.dumps(value).encode() + b"\n")


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    head, descriptors, _, _ = socket.recv_fds(connection, LENGTH, 3)
    with connection.makefile("rb") as rest:
        return json.loads(rest.read(int.from_bytes(head, "big"))), descriptors


def _become(request: dict[str, Any], descriptors: list[int]) -> NoReturn:
    """Do in a forked process what was asked for, and end it."""
    os.setsid()
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    os.chdir(request["cwd"])
    if "script" in request:
        status = _status(lambda: _run_script(request["script"], request["arguments"]))
    else:
        module, _, name = request["call"].partition(":")
        status = _status(lambda: getattr(importlib.import_module(module), name)(**request["arguments"]))
    _flush()
    os._exit(status)  # destructors of gloo and DeepSpeed may wait for peers that have already left


def _status(run: Callable[[], Any]) -> int:
    """Exit status of a process whose main part is `run`."""
    try:
        run()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        _flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _run_script(path: str, arguments: list[str]) -> None:
    sys.argv = [path, *arguments]
    sys.path[0] = str(Path(path).resolve().parent)
    try:
        runpy.run_path(path, run_name="__main__")
    finally:
        # as Python does at its end
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def serve(place: str, modules: list[str]) -> NoReturn:
    """Import the modules and serve requests at `place` until standard input ends."""
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # collections in forks would write to, and so copy, every page of the libraries' objects
    _Server(place).run()


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
