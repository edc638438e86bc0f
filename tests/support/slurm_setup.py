"""What a SLURM of our own is made of: its configuration, its folder, its processes."""

import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "unshare", "setpriv", "mknod")
NODES = ("n1", "n2", "n3")
PARTITIONS = ("low", "high", "nograce", "closed")
GRACE_S = 20
"""Of `low`, once a job of `high` wants its nodes."""
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

_OWN = ["unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
# The shell stays the node's first process: it reaps what SLURM's own leave behind.
_BOOT = """
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount -t tmpfs -o size=64m tmpfs "$2/local"
slurmd -D -N "$1" -f "$2/slurm.conf" &
wait $!
"""


def missing() -> str | None:
    """Why there can be no SLURM here; None where there can."""
    path = search_path()
    absent = [name for name in NEEDED if shutil.which(name, path=path) is None]
    if absent:
        return f"{', '.join(absent)} not found; apt-get install slurmctld slurmd slurm-client munge"
    if os.geteuid() != 0:
        return "a SLURM of several nodes on one machine needs root (namespaces, device nodes); run the tests as root"
    # In some containers root may neither make namespaces nor device nodes.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        for words in ([*_OWN, "true"], ["mknod", f"{folder}/gpu", "c", "1", "3"]):
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                return f"{words[0]}: {done.stderr.strip()}; run the tests as root outside of a container"
    return None


def lay_out(folder: Path) -> None:
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


def environment(folder: Path) -> dict[str, str]:
    """For clients, and through them for jobs: this Python first, no trace of a job that we may be in ourselves."""
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SQUEUE"))}
    return {
        **outer,
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": search_path(),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }


def search_path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def boot(folder: Path, name: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return spawn(folder, [*_OWN, "bash", "-c", _BOOT, "boot", name, str(folder)], environment)


def spawn(folder: Path, words: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """In a session of its own, ended when this process ends, however that is."""
    with (folder / "daemons.log").open("ab") as log:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *words],
            env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


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
