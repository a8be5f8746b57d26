"""Ranks that start again on the store of those that died; what is there, and in which order they come, is set here."""

from __future__ import annotations

import datetime
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from minicpm_megatron.parallel import groups, meeting
from minicpm_megatron.recipe import build
from tests.distributed.launch import run_on_ranks
from tests.recipe.fields import minimal_fields

pytestmark = pytest.mark.cpu_only("ranks over gloo")

PATIENCE = datetime.timedelta(seconds=60)


def join(counts: list[list[str]]) -> list[float]:
    """On a node of one rank, join once for each count of restarts; sums of ones over the ranks."""
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    layout, sums = build(minimal_fields()).check_world_size(2), []
    for count in counts[int(os.environ["RANK"])]:
        os.environ["TORCHELASTIC_RESTART_COUNT"] = count
        groups.initialize(layout, timeout=datetime.timedelta(seconds=20), job="x")
        value = torch.ones(1)
        dist.all_reduce(value)
        sums.append(float(value))
        groups.destroy()
    return sums


def store() -> dist.TCPStore:
    """As an elastic agent hosts one."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=PATIENCE)


def client(server: dist.TCPStore) -> dist.TCPStore:
    """As a rank has one."""
    return dist.TCPStore("127.0.0.1", server.port, timeout=PATIENCE)


def test_ranks_meet_whatever_their_nodes_count() -> None:
    """Of two nodes the one whose rank has failed counts a restart, and the other one does not."""
    server = store()
    agent = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    counts = [["0", "0", "0"], ["0", "1", "1"]]
    assert run_on_ranks("tests.parallel.test_meeting:join", 2, env=agent, counts=counts) == [[2.0, 2.0, 2.0]] * 2


def test_what_the_dead_have_asked_and_heard_is_no_answer() -> None:
    server = store()
    server.set("question 1", "of the dead")
    server.set("answer of the dead", "another start")
    with ThreadPoolExecutor() as pool:
        first: Any = pool.submit(meeting.name_of_start, client(server), 0, 3, PATIENCE)
        second: Any = pool.submit(meeting.name_of_start, client(server), 2, 3, PATIENCE)
        # rank 0 has answered rank 2, so that it has looked at the question of the dead before rank 1 comes
        name = second.result()
        assert name != "another start" and not first.done()
        third: Any = pool.submit(meeting.name_of_start, client(server), 1, 3, PATIENCE)
        assert first.result() == third.result() == name
        # and once more, the other way round
        others = [pool.submit(meeting.name_of_start, client(server), rank, 3, PATIENCE) for rank in (1, 2)]
        again = meeting.name_of_start(client(server), 0, 3, PATIENCE)
        assert again != name and [other.result() for other in others] == [again, again]


def test_ranks_that_do_not_come_are_named() -> None:
    server = store()
    with pytest.raises(dist.DistStoreError, match="ranks 1, 2 did not come"):
        meeting.name_of_start(server, 0, 3, datetime.timedelta(0))
