"""Ranks on several nodes: two agents that meet as `llmtrain submit` has them meet, here on one machine."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from launcher.keeper import torchrun
from launcher.keeper.processes import ranks_of
from llmtrain.errors import EXIT_CODES
from llmtrain.rundir import RunDir
from tests.support.runs import TIMEOUT_S, Workplace, environment, free_port
from tests.support.slurm_runs import wait_for_checkpoint

LONG = ["train.steps=2000", "evaluate.every_steps=null"]
SLOW_AGENT = """
import runpy, sys, time
from torch.distributed.elastic.utils import store
says_its_word = store._barrier_nonblocking
def slowly(**arguments):
    key = says_its_word(**arguments)
    time.sleep(0.5)  # a busy machine: its word is there, and it does not listen yet
    return key
store._barrier_nonblocking = slowly
sys.argv = sys.argv[1:]
runpy.run_module("torch.distributed.run", run_name="__main__")
"""
"""torchrun, where what can last milliseconds between two agents lasts half a second."""


@contextlib.contextmanager
def two_nodes(workplace: Workplace, codes: Path, *settings: str) -> Iterator[list["subprocess.Popen[str]"]]:
    """The first node's agent, and a slow one."""
    place = torchrun.Place("localhost", free_port(), "localhost")
    agents: list[subprocess.Popen[str]] = []
    for node in (0, 1):
        start = torchrun.Start([str(workplace.config), *settings], ranks=1, node=node, num_nodes=2)
        command = torchrun.command(start, place, False, codes / f"torchrun-{node}")
        assert command[1:3] == ["-m", "torch.distributed.run"]
        if node:
            command[1:3] = ["-c", SLOW_AGENT, "torchrun"]
        agents.append(
            subprocess.Popen(
                command,
                cwd=workplace.folder,
                env={**environment(), **torchrun.ENVIRONMENT, EXIT_CODES: str(codes)},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    try:
        yield agents
    finally:
        for agent in agents:
            agent.kill()


def test_a_stop_on_two_nodes_leaves_no_traceback(workplace: Workplace, tmp_path: Path):
    with two_nodes(workplace, tmp_path, "run.name=two-nodes", *LONG) as agents:
        wait_for_checkpoint(RunDir(workplace.run_folder("two-nodes")))
        for agent in agents:
            for rank in ranks_of(agent.pid):
                os.kill(rank.pid, signal.SIGUSR2)
        said = [agent.communicate(timeout=TIMEOUT_S)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert "saved" in said[0]
    assert not any("Traceback" in each for each in said), said
