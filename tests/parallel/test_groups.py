"""Joining a job where the machine has no port or no more files for it: one line that says what to do."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from tests.cli.commands import ROOT

pytestmark = pytest.mark.cpu_only("a rank over gloo")

JOIN = """
import os, resource, sys
from minicpm_megatron.errors import UserError
from minicpm_megatron.parallel import groups
from minicpm_megatron.recipe import build
from tests.recipe.fields import minimal_fields

def join(world_size):
    try:
        groups.initialize(build(minimal_fields()).check_world_size(world_size))
    except UserError as error:
        print(error, flush=True)

os.environ |= {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1]}
join(2)
for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    del os.environ[name]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
join(1)
"""


def test_a_port_in_use_and_too_few_files_are_one_line_each() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-c", JOIN, str(port)], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stdout + done.stderr
    assert lines[0].startswith(f"the launcher's port: port {port} is in use") and "--master_port PORT" in lines[0]
    assert lines[1] == "ulimit -n: 64 open files are too few for a process; allow more: ulimit -n 4096"
