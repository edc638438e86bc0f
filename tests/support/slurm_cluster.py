"""A real SLURM on this machine, for tests: its controller and three nodes with two fake GPUs each.

Each node has a hostname, process ids and a hosts file of its own, so that killing the first of its processes is what
a crash of the node is: all else in there dies with it. Everything lies in one new folder, on ports that were free, and
dies with the process that started it. By hand: `python -m tests.support.slurm_cluster` (root).
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "unshare", "setpriv", "mknod")
NODES = ("n1", "n2", "n3")
PARTITIONS = ("low", "high", "nograce", "closed")
GRACE_S = 20
"""Of `low`, once a job of `high` wants its nodes."""
START_S = 30.0
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "DEADLINE")

_CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
JobRequeue=1
FirstJobId={first_job}
MaxArraySize=101
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=10
KillWait=5
ReturnToService=2
MailProg=/bin/true
GresTypes=gpu
{nodes}
PartitionName=low Nodes=n[1-3] Default=YES PriorityTier=1 GraceTime={grace} MaxTime=2-00:00:00 DefaultTime=1:00:00
PartitionName=nograce Nodes=n[1-3] PriorityTier=1 GraceTime=0 MaxTime=2-00:00:00 DefaultTime=1:00:00
PartitionName=high Nodes=n[1-3] PriorityTier=10 PreemptMode=OFF MaxTime=2-00:00:00 DefaultTime=1:00:00
PartitionName=closed Nodes=n3 PriorityTier=1 AllowAccounts=physics MaxTime=10
"""
_NODE = "NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=16000 Gres=gpu:2"

# The shell stays the node's first process: it reaps what SLURM's own leave behind.
_BOOT = """
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount -t tmpfs -o size=64m tmpfs "$2/local"
slurmd -D -N "$1" -f "$2/slurm.conf" &
wait $!
"""


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
        while True:
            told = self.describe(job_id)
            if int(told["Restarts"]) >= restarts and told["JobState"] == "RUNNING":
                return
            is_over = told["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
            assert not is_over, f"job {job_id} is over: {told}"
            assert time.monotonic() < deadline, f"job {job_id} was not started again: {told}"
            if told["JobState"] == "PENDING" and told["Reason"] == "BeginTime":
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
        self.node_processes[name] = _boot(self.folder, name, self.environment)
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


def missing() -> str | None:
    """Why there can be no SLURM here; None where there can."""
    path = _search_path()
    absent = [name for name in NEEDED if shutil.which(name, path=path) is None]
    if absent:
        return f"{', '.join(absent)} not found; apt-get install slurmctld slurmd slurm-client munge"
    if os.geteuid() != 0:
        return "a SLURM of several nodes on one machine needs root (namespaces, device nodes); run the tests as root"
    return None


def start() -> Cluster:
    """A SLURM with all nodes up.

    Raises:
        NotPossible: a package or a right is missing.
    """
    if (reason := missing()) is not None:
        raise NotPossible(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munge's clients must reach its socket
    _lay_out(folder)
    cluster = Cluster(folder, _environment(folder))
    try:
        _start_daemons(cluster)
        for name in NODES:
            cluster.node_processes[name] = _boot(folder, name, cluster.environment)
        cluster._wait_for_nodes(NODES)
    except BaseException:
        cluster.daemons, daemons = [], cluster.daemons  # nothing to cancel
        for process in daemons:
            process.kill()
            process.wait()
        cluster.stop()
        raise
    return cluster


def _lay_out(folder: Path) -> None:
    """Files and device nodes that SLURM reads."""
    controller, *ports = free_ports(1 + len(NODES))
    nodes = "\n".join(_NODE.format(name=name, port=port) for name, port in zip(NODES, ports, strict=True))
    (folder / "slurm.conf").write_text(
        _CONFIGURATION.format(
            host=os.uname().nodename, folder=folder, controller_port=controller, nodes=nodes, grace=GRACE_S,
            # By the clock: files of another cluster's jobs are never taken for those of ours.
            first_job=int(time.time() * 10) % 60_000_000 + 1,
        )
    )  # fmt: skip
    # With regular files in their place jobs would see no GPUs.
    (folder / "gres.conf").write_text(f"NodeName=n[1-3] Name=gpu File={folder}/gpu[0-1]\n")
    for number in (0, 1):
        subprocess.run(["mknod", str(folder / f"gpu{number}"), "c", "1", "3"], check=True)
    # Each node by an address of its own; names that do not resolve would hang gloo for minutes.
    own = [f"127.0.77.{number} {name}" for number, name in enumerate(NODES, 1)]
    (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", f"127.0.0.1 {os.uname().nodename}", *own, ""]))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    for name in ("state", "local", *(f"spool-{name}" for name in NODES)):
        (folder / name).mkdir()


def _environment(folder: Path) -> dict[str, str]:
    """For clients, and through them for jobs: this Python first, no trace of a job that we may be in ourselves."""
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SQUEUE"))}
    return {
        **outer,
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": _search_path(),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }


def _search_path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def _start_daemons(cluster: Cluster) -> None:
    folder = cluster.folder
    munge = [f"--{name}={folder}/munge.{name.removesuffix('-file')}" for name in ("key-file", "pid-file", "log-file")]
    words = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge]
    cluster.daemons.append(_spawn(folder, words, cluster.environment))
    _wait_until(folder, (folder / "munge.socket").exists, "munged")
    cluster.daemons.append(
        _spawn(folder, ["slurmctld", "-D", "-f", str(folder / "slurm.conf")], cluster.environment),
    )
    _wait_until(folder, lambda: "UP" in cluster.call("scontrol", "ping", check=False), "slurmctld")


def _boot(folder: Path, name: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    own = ["unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    return _spawn(folder, [*own, "bash", "-c", _BOOT, "boot", name, str(folder)], environment)


def _spawn(folder: Path, words: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """In a session of its own, ended when this process ends, however that is."""
    with (folder / "daemons.log").open("ab") as log:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *words],
            env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def _wait_until(folder: Path, condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} does not start:\n{_log(folder)}"
        time.sleep(0.05)


def _log(folder: Path) -> str:
    logs = [folder / name for name in ("daemons.log", "slurmctld.log", "munge.log")]
    return "\n".join(log.read_text(errors="replace")[-2000:] for log in logs if log.exists())


def free_ports(count: int) -> list[int]:
    """Below those that the system hands out, so that nobody else is given them meanwhile."""
    found: list[int] = []
    probes: list[socket.socket] = []
    generator = random.SystemRandom()
    while len(found) < count:
        port = generator.randrange(12_000, 32_000)
        probe = socket.socket()
        try:
            probe.bind(("", port))
        except OSError:
            probe.close()
            continue
        found.append(port)
        probes.append(probe)
    for probe in probes:
        probe.close()
    return found


def main() -> None:
    """Until Ctrl-C, with the lines that make a shell a client of it."""
    cluster = start()
    for name in ("SLURM_CONF", "PATH"):
        print(f"export {name}={cluster.environment[name]}", flush=True)
    try:
        signal.pause()
    except KeyboardInterrupt:
        cluster.stop()


if __name__ == "__main__":
    main()
