"""A real SLURM on this machine, for tests: its controller and three nodes with two fake GPUs each.

Each node has a hostname, process ids and a hosts file of its own, so that killing the first of its processes is what
a crash of the node is: all else in there dies with it. Everything lies in one new folder, on ports that were free, and
dies with the process that started it. By hand: `python -m tests.support.slurm_cluster` (root).
"""

import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.slurm_setup import NODES, PARTITIONS, boot, environment, lay_out, missing, spawn

START_S = 30.0
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "DEADLINE")


class NotPossible(Exception):
    """SLURM cannot be started here; says what is missing."""


@dataclass
class Cluster:
    """A SLURM that runs. Clients find it by `environment`."""

    folder: Path
    environment: dict[str, str]
    partitions: tuple[str, ...] = PARTITIONS
    nodes: tuple[str, ...] = NODES
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list[subprocess.Popen[bytes]])
    """munged and slurmctld."""
    node_processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict[str, subprocess.Popen[bytes]])

    @property
    def local_disk(self) -> Path:
        """A path where each node has a small disk of its own, and so has this machine."""
        return self.folder / "local"

    def call(self, *words: str, timeout_s: float = 30, check: bool = True) -> str:
        """Standard output of one of SLURM's commands; fails the test where it fails."""
        done = subprocess.run(
            words, env=self.environment, text=True, capture_output=True, timeout=timeout_s, check=False
        )
        assert done.returncode == 0 or not check, f"{words}: {done.stdout}{done.stderr}"
        return (done.stdout if check else done.stdout + done.stderr).strip()

    def submit(self, script: str, *options: str) -> str:
        """The job's id. Its output goes to slurm-ID.out in the cluster's folder unless options say otherwise."""
        words = ["sbatch", "--parsable", f"--chdir={self.folder}", *options]
        text = script if script.startswith("#!") else f"#!/bin/bash\n{script}\n"
        done = subprocess.run(
            words, env=self.environment, input=text, text=True, capture_output=True, timeout=30, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().split(";")[0]

    def output(self, job_id: str) -> str:
        return (self.folder / f"slurm-{job_id}.out").read_text()

    def describe(self, job_id: str) -> dict[str, str]:
        """What scontrol says of a job (of an array: of its first line); empty when it has forgotten it."""
        said = self.call("scontrol", "--oneliner", "show", "job", job_id, check=False)
        if "Invalid job id" in said:
            return {}
        return dict(word.split("=", 1) for word in said.splitlines()[0].split() if "=" in word)

    def state(self, job_id: str) -> str:
        """PENDING, RUNNING, COMPLETED...; empty when SLURM has forgotten the job."""
        return self.describe(job_id).get("JobState", "")

    def wait_for(self, job_id: str, states: Collection[str] = OVER, timeout_s: float = 60) -> str:
        """Until the job is in one of these states; returns which one."""
        wanted = (states,) if isinstance(states, str) else states
        deadline = time.monotonic() + timeout_s
        while (state := self.state(job_id)) not in wanted:
            assert time.monotonic() < deadline, f"job {job_id} is {state}, not {wanted}: {self.describe(job_id)}"
            time.sleep(0.2)
        return state

    def wait_for_restart(self, job_id: str, restarts: int = 1, timeout_s: float = 90) -> None:
        """Until SLURM has requeued the job so many times and started it again."""
        deadline = time.monotonic() + timeout_s
        waits_since: float | None = None
        while True:
            told = self.describe(job_id)
            if int(told["Restarts"]) >= restarts and told["JobState"] == "RUNNING":
                return
            is_over = told["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
            assert not is_over, f"job {job_id} is over: {told}"
            assert time.monotonic() < deadline, f"job {job_id} was not started again: {told}"
            if told["JobState"] == "PENDING" and told["Reason"] == "BeginTime":
                # Not at once, which SLURM never does: what is left of the first start may count as the second's end.
                waits_since = waits_since or time.monotonic()
                if time.monotonic() - waits_since > 2:
                    self.release(job_id)
            time.sleep(0.2)

    def release(self, job_id: str) -> None:
        """A requeued job need not wait until SLURM would start it again."""
        self.call("scontrol", "update", f"JobId={job_id}", "StartTime=now", check=False)

    def cancel_all(self, timeout_s: float = 30) -> None:
        """Cancel every job and wait until nothing of them runs."""
        deadline = time.monotonic() + timeout_s
        asked = time.monotonic()
        while jobs := sorted(set(self.call("squeue", "--noheader", "--format=%A").split())):
            assert time.monotonic() < deadline, f"these jobs do not end: {jobs}"
            self.call("scancel", *jobs, check=False)
            if time.monotonic() - asked > 2:
                self.call("scancel", "--signal=KILL", "--full", *jobs, check=False)
            time.sleep(0.2)

    def kill_node(self, name: str, noticed: bool = True) -> None:
        """As a crash of that machine.

        Args:
            noticed: SLURM is told; it would find out by itself some 25 seconds later.
        """
        process = self.node_processes.pop(name)
        process.kill()
        process.wait()
        if noticed:
            self.call("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=crash")

    def revive_node(self, name: str) -> None:
        """Start the node again and wait until it takes jobs."""
        self.node_processes[name] = boot(self.folder, name, self.environment)
        self._wait_for_nodes([name])

    def heal(self) -> None:
        """As it was at the start: no jobs, all nodes there."""
        self.cancel_all()
        for name in self.nodes:
            if name not in self.node_processes:
                self.revive_node(name)
        self._wait_for_nodes(self.nodes)

    def stop(self) -> None:
        if all(process.poll() is None for process in self.daemons):
            self.cancel_all()
        for process in [*self.node_processes.values(), *reversed(self.daemons)]:
            process.kill()
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _wait_for_nodes(self, names: Sequence[str]) -> None:
        deadline = time.monotonic() + START_S
        while True:
            states = self.call("sinfo", "--noheader", "--Node", "--format=%N %T", check=False)
            ready = {
                line.split()[0] for line in states.splitlines() if line.endswith((" idle", " mixed", " allocated"))
            }
            down = [name for name in names if name not in ready]
            if not down:
                return
            assert time.monotonic() < deadline, f"not up: {states}\n{_log(self.folder)}"
            for name in down:  # refused where there is nothing to resume
                self.call("scontrol", "update", f"NodeName={name}", "State=RESUME", check=False)
            time.sleep(0.1)


def start() -> Cluster:
    """A SLURM with all nodes up.

    Raises:
        NotPossible: a package or a right is missing.
    """
    if (reason := missing()) is not None:
        raise NotPossible(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munge's clients must reach its socket
    lay_out(folder)
    cluster = Cluster(folder, environment(folder))
    try:
        _start_daemons(cluster)
        for name in NODES:
            cluster.node_processes[name] = boot(folder, name, cluster.environment)
        cluster._wait_for_nodes(NODES)
    except BaseException:
        cluster.daemons, daemons = [], cluster.daemons  # nothing to cancel
        for process in daemons:
            process.kill()
            process.wait()
        cluster.stop()
        raise
    return cluster


def _start_daemons(cluster: Cluster) -> None:
    folder = cluster.folder
    munge = [f"--{name}={folder}/munge.{name.removesuffix('-file')}" for name in ("key-file", "pid-file", "log-file")]
    words = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge]
    cluster.daemons.append(spawn(folder, words, cluster.environment))
    _wait_until(folder, (folder / "munge.socket").exists, "munged")
    cluster.daemons.append(
        spawn(folder, ["slurmctld", "-D", "-f", str(folder / "slurm.conf")], cluster.environment),
    )
    _wait_until(folder, lambda: "UP" in cluster.call("scontrol", "ping", check=False), "slurmctld")


def _wait_until(folder: Path, condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} does not start:\n{_log(folder)}"
        time.sleep(0.05)


def _log(folder: Path) -> str:
    logs = [folder / name for name in ("daemons.log", "slurmctld.log", "munge.log")]
    return "\n".join(log.read_text(errors="replace")[-2000:] for log in logs if log.exists())


def main() -> None:
    """Until Ctrl-C, with the lines that make a shell a client of it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cluster = start()
    for name in ("SLURM_CONF", "PATH"):
        print(f"export {name}={cluster.environment[name]}", flush=True)
    try:
        signal.pause()
    except KeyboardInterrupt:
        cluster.stop()


if __name__ == "__main__":
    main()
