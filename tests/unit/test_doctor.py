"""`llmtrain doctor`: what is here, and a first profile of a cluster."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from launcher.checks import doctor, draft
from launcher.cluster import Profile, load_profile
from launcher.findings import Finding
from launcher.slurm import client, partitions
from llmtrain.errors import ConfigError, SlurmError
from tests.support.runs import environment

SINFO = """cpu|idle|4|64|256000|(null)|(null)
gpu|idle|2|64|512000|gpu:a100:4(S:0-1)|a100,nvlink
gpu|drained|1|32|256000|gpu:v100:2|v100
2080|mixed|1|16|64000|gpu:2080:8|(null)
short|idle|1|8|16000|(null)|(null)
"""
SCONTROL = """PartitionName=cpu AllowAccounts=ALL Default=YES MaxNodes=UNLIMITED MaxTime=UNLIMITED State=UP
PartitionName=gpu AllowAccounts=physics,math Default=NO MaxNodes=UNLIMITED MaxTime=2-12:00:00 State=UP
PartitionName=2080 AllowAccounts=ALL Default=NO MaxNodes=UNLIMITED MaxTime=1-00:00:00 State=DOWN
PartitionName=short AllowAccounts=ALL Default=NO MaxNodes=UNLIMITED MaxTime=00:03:00 State=UP
"""


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What SLURM's commands say, by their first word."""
    said = {"sinfo": SINFO, "scontrol show": "ClusterName             = juno\n", "scontrol --oneliner": SCONTROL}

    def call(words: Sequence[str], timeout_s: float = 30.0) -> str:
        for start, text in said.items():
            if " ".join(words).startswith(start):
                return text
        raise SlurmError(f"{words[0]}: not found")

    for module in (draft, partitions):
        monkeypatch.setattr(module, "call", call)
    for name in ("SCRATCH", "WORK", "PROJECT", "LOADEDMODULES"):
        monkeypatch.delenv(name, raising=False)
    return said


def drafted(tmp_path: Path, partition: str | None = None) -> tuple[str, Profile]:
    file = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
    doctor.draft(partition, file)
    return file.read_text(), load_profile(file)


def test_the_partition_with_gpus_is_drafted(tmp_path: Path, slurm: dict[str, str]):
    text, profile = drafted(tmp_path)
    assert (profile.name, profile.partition, profile.gpus_per_node, profile.cpus_per_gpu) == ("juno", "gpu", 4, 16)
    assert (profile.time, profile.account, profile.service.partition) == ("24:00:00", None, "cpu")
    assert "gpus_per_node: 4     # other nodes have 2" in text
    assert "# account: FILL IN               # one of physics, math" in text
    assert "#   cpu (default): 4 nodes with 0 GPUs, 64 CPUs, 250 GB; no time limit" in text
    assert "1 node with 8 GPUs, 16 CPUs, 62 GB; up to 1 d 0 h, DOWN" in text
    assert "# constraint: a100     # to choose among nodes: a100, nvlink, v100" in text


def test_every_partition_makes_a_profile_that_loads(tmp_path: Path, slurm: dict[str, str]):
    for name in ("cpu", "gpu", "2080", "short"):
        assert drafted(tmp_path, name)[1].partition == name
    _, cpu = drafted(tmp_path, "cpu")
    assert (cpu.gpus_per_node, cpu.cpus_per_node, cpu.time) == (0, 64, "24:00:00")
    _, short = drafted(tmp_path, "short")
    assert (short.time, short.signal_s) == ("00:03:00", 45)
    with pytest.raises(ConfigError, match="there are cpu, gpu, 2080 and short"):
        drafted(tmp_path, "long")


def test_what_the_login_knows_is_filled_in(tmp_path: Path, slurm: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    slurm["sacctmgr"] = "physics\nphysics\nchemistry\n"
    slurm["scontrol show"] = "ClusterName = 2024\n"
    monkeypatch.setenv("SCRATCH", "/scratch/ada")
    monkeypatch.setenv("LOADEDMODULES", "gcc/12:cuda/12.8")
    of = {Path("/scratch/ada"): ("shared", "")}
    monkeypatch.setattr(draft, "find_reach", lambda path, _: of.get(path, ("unknown", "")))
    text, profile = drafted(tmp_path)
    assert (profile.account, profile.shared, profile.name) == ("physics", ["/scratch/ada"], "2024")
    assert "loaded here: gcc/12 cuda/12.8" in text


def test_an_existing_profile_is_kept(tmp_path: Path, slurm: dict[str, str], capsys: pytest.CaptureFixture[str]):
    (tmp_path / "juno.yaml").write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        doctor.draft(None, tmp_path / "juno.yaml")
    assert (tmp_path / "juno.yaml").read_text() == "mine"
    doctor.draft(None, None)
    assert "partition: gpu" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- this machine


def test_a_login_is_found_without_showing_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    token = "hf_" + "t" * 34
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert "not logged in" in doctor.examine_login().message
    (tmp_path / "token").write_text(token)
    assert doctor.examine_login().message == f"logged in ({tmp_path / 'token'})"
    monkeypatch.setenv("HF_TOKEN", token)
    assert doctor.examine_login().message == "a token in HF_TOKEN"


def test_the_machine_is_described(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(client, "is_here", lambda: False)
    found = doctor.examine()
    assert [finding.what for finding in found] == ["Python", "torch", "GPUs", "CPU", "memory", "disk", "SLURM", "Hub"]
    assert all(isinstance(finding, Finding) and finding.message for finding in found)


def test_the_command_runs_anywhere(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "doctor"],
        cwd=tmp_path, env={**environment(), "PATH": "/nowhere"}, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not here: 'llmtrain run' trains on this machine" in " ".join(done.stdout.split())
