"""Which processes are a rank's launcher, under launchers of any name; each test decides when one of them dies."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from minicpm_megatron.training import launcher
from tests.cli.commands import ROOT

MARKS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")
# a rank that says whether its launcher is dead whenever it is asked
RANK = """
import os
from minicpm_megatron.training.launcher import Launcher
launcher = Launcher()
launcher.take_over()
print(os.getppid(), launcher.is_dead(), flush=True)
input()
print(launcher.is_dead(), flush=True)
"""
STARTER = "import subprocess, sys; subprocess.run(sys.argv[1:])"


@dataclass
class Above:
    """A process above a rank."""

    pid: int
    command: str

    def cmdline(self) -> list[str]:
        return self.command.split()

    def name(self) -> str:
        return Path(self.command.split()[0]).name


def start(*command: object, mark: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*map(str, command), sys.executable, "-c", RANK],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key not in MARKS} | {"RANK": "1", mark: "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def told(job: subprocess.Popen[str]) -> tuple[psutil.Process, str]:
    """The rank's parent, and whether the rank thinks at its start that its launcher is dead."""
    assert job.stdout is not None
    pid, dead = job.stdout.readline().split()
    return psutil.Process(int(pid)), dead


def after(job: subprocess.Popen[str], dies: psutil.Process) -> str:
    """What the rank thinks after one of its launcher's processes has died."""
    dies.kill()
    psutil.wait_procs([dies])
    said, _ = job.communicate("\n", timeout=60)
    return said.strip()


@pytest.mark.parametrize("mark", MARKS)
def test_a_launcher_may_have_any_name(mark: str, tmp_path: Path) -> None:
    script = tmp_path / "start.py"
    script.write_text(STARTER)
    job = start(sys.executable, script, mark=mark)
    parent, dead = told(job)
    assert parent.pid == job.pid and dead == "False"
    assert after(job, parent) == "True"


def test_a_script_may_stand_between_launcher_and_rank(tmp_path: Path) -> None:
    command, wrapper = tmp_path / "torchrun", tmp_path / "wrap.sh"
    command.write_text(STARTER)
    wrapper.write_text('"$@"\nexit $?\n')
    job = start(sys.executable, command, "bash", wrapper, mark=MARKS[0])
    parent, dead = told(job)
    assert parent.ppid() == job.pid and dead == "False"
    assert after(job, psutil.Process(job.pid)) == "True"


def test_a_late_look_leaves_a_death_to_who_has_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    mine = launcher.Launcher()
    monkeypatch.setattr(mine, "is_dead", lambda: True)
    monkeypatch.setattr("os._exit", lambda status: pytest.fail(f"the process ends with {status}"))
    mine.take_over()
    mine._watch()


FRONT, NODE = "python /bin/deepspeed x.py", "python -m deepspeed.launcher.launch x.py"


@pytest.mark.parametrize(
    ("marked", "commands", "found"),
    [
        (True, ["accelerate launch x.py", "bash"], [0]),
        (True, [NODE, FRONT, "bash"], [0, 1]),
        (True, ["bash wrap.sh", NODE, FRONT, "bash"], [0, 1, 2]),
        (True, ["bash wrap.sh", "numactl x", "torchrun x.py", "bash"], [0, 2]),
        (True, [], []),
        (False, ["bash", "sshd"], []),
        (False, ["slurmstepd", "srun x", FRONT, "bash"], [2]),
    ],
)
def test_the_processes_of_a_launcher(marked: bool, commands: list[str], found: list[int]) -> None:
    parents: Any = [Above(10 - place, command) for place, command in enumerate(commands)]
    assert launcher._launchers(parents, marked) == [parents[place] for place in found]


@pytest.mark.parametrize(
    ("pid", "command", "session", "leaderless", "orphan"),
    [
        (1, "/sbin/init", 77, False, True),
        (1, "/agent --port 1", 77, False, True),
        (800, "/usr/lib/systemd/systemd --user", 77, False, True),
        (1, "bash run.sh", 77, False, True),
        (1, "python /bin/accelerate launch x.py", 77, False, False),
        (1, "/opt/bin/python3.12 start.py", 77, False, False),
        (1, "/bin/tini -- torchrun x.py", 77, False, False),
        (1, "/bin/tini -- python x.py", 1, False, False),
        (1, "bash wrap.sh", 0, False, False),
        (50, "python start.py", 77, False, False),
        (50, "bash wrap.sh", 77, False, False),
        # a container's shell has started the launcher that is gone; its init has started this rank, and is the launcher
        (1, "bash", 1, True, True),
        (1, "/bin/tini -- bash run.sh", 1, True, True),
        (1, "python /bin/accelerate launch x.py", 1, True, False),
        (50, "bash", 1, True, False),
    ],
)
def test_only_a_child_of_init_that_is_no_launcher_is_an_orphan(
    pid: int, command: str, session: int, leaderless: bool, orphan: bool
) -> None:
    parents: Any = [Above(pid, command)]
    assert launcher._is_orphan(parents, session, leaderless) is orphan
    assert launcher._is_orphan([], session, leaderless) is False


# prints the number of a process that it leaves behind, which waits until its input ends
LEADER = "import subprocess; print(subprocess.Popen(['cat'], stdin=0).pid)"


def test_a_process_group_whose_leader_has_gone() -> None:
    leader = subprocess.Popen(
        [sys.executable, "-c", LEADER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
    )
    assert leader.stdin is not None and leader.stdout is not None
    member = int(leader.stdout.readline())
    leader.wait(timeout=60)
    assert launcher._has_lost_its_leader(os.getpgid(member))
    leader.stdin.close()
    leader.stdout.close()
    assert not any(launcher._has_lost_its_leader(group) for group in (0, 1, os.getpid()))
