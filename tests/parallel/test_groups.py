"""Joining a job where the machine has no port or no more files for it: one line that says what to do."""

from __future__ import annotations

import os
import resource
import socket

import pytest

from minicpm_megatron.errors import UserError
from minicpm_megatron.parallel import groups
from minicpm_megatron.recipe import build
from tests.processes.client import run_call
from tests.recipe.fields import minimal_fields

pytestmark = pytest.mark.cpu_only("a rank over gloo")


def join_twice(port: int) -> None:
    """Print how it ends to join at a port, and alone with few files."""
    _join(2, RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    _join(1)


def _join(world_size: int, **environment: str) -> None:
    os.environ |= environment
    try:
        groups.initialize(build(minimal_fields()).check_world_size(world_size))
    except UserError as error:
        print(error, flush=True)
    for name in environment:
        del os.environ[name]


def test_a_port_in_use_and_too_few_files_are_one_line_each() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = run_call("tests.parallel.test_groups:join_twice", port=port)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stdout + done.stderr
    assert lines[0].startswith(f"the launcher's port: port {port} is in use") and "--master_port PORT" in lines[0]
    assert lines[1] == "ulimit -n: 64 open files are too few for a process; allow more: ulimit -n 4096"
