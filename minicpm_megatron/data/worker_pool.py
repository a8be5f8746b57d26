"""Run one function over many tasks on several processes, in a way that survives whatever happens to them.

Unlike the standard pools: a worker that is killed (out of memory) ends the job with one clear line instead of a
hang, workers leave when their parent is killed, and progress flows while a task runs. Processes are spawned, so that
no thread or lock of the parent is copied; the function and its modules must be importable.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from minicpm_megatron.errors import UserError

Report = Callable[[int], None]


def run_tasks(
    target: str, setup: Any, tasks: Sequence[Any], workers: int, on_progress: Callable[[int], None]
) -> Generator[tuple[int, Any], None, None]:
    """Do all tasks; yield (index, result) as they finish.

    Args:
        target: "package.module:function"; called in each worker once as function(setup), it returns the function
            that does a task: task, report -> result, where report(n) adds n to the progress.
        setup, tasks: picklable.
        workers: number of processes, at most one for each task.
        on_progress: called in this process with what workers report.

    Raises:
        UserError: a worker died; or what a task raised, if it is a UserError.
    """
    context = multiprocessing.get_context("spawn")
    queue = list(enumerate(tasks))[::-1]
    members: dict[Connection, Any] = {}
    done = False
    try:
        for _ in range(min(workers, len(tasks))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, target, setup), daemon=True)
            process.start()
            # with our copy closed, a dead worker is an end of file here and a dead parent is one there
            theirs.close()
            members[ours] = process
            ours.send(queue.pop())
        while members:
            for connection in wait(list(members)):
                assert isinstance(connection, Connection)
                try:
                    kind, value = connection.recv()
                except (EOFError, ConnectionResetError) as error:
                    process = members[connection]
                    process.join()
                    raise UserError(
                        f"a worker died ({_status(process.exitcode)})",
                        fix="run the same command again to go on from the finished parts, with fewer --workers if"
                        " memory ran out",
                    ) from error
                if kind == "progress":
                    on_progress(value)
                elif kind == "error":
                    raise value
                else:
                    if queue:
                        connection.send(queue.pop())
                    else:
                        connection.send(None)
                        members.pop(connection).join()
                        connection.close()
                    yield value
        done = True
    finally:
        for connection, process in members.items():
            if not done:
                process.terminate()
            process.join()
            connection.close()


def _status(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit status {code}"


def _serve(connection: Connection, target: str, setup: Any) -> None:
    """A worker's life; it ends when the parent says so or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    module, name = target.split(":")

    def report(size: int) -> None:
        try:
            connection.send(("progress", size))
        except OSError:  # the parent is gone; a task must not take that for a fault of its files and carry on
            os._exit(1)

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            work = getattr(importlib.import_module(module), name)(setup)
            while (task := connection.recv()) is not None:
                index, argument = task
                result = work(argument, report)
                connection.send(("result", (index, result)))
        except UserError as error:
            connection.send(("error", error))
