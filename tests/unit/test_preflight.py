"""What is looked at before a job is queued, where no SLURM is needed to tell."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.checks import places, preflight
from launcher.checks.environment import look_into, read_torch
from launcher.checks.places import find_reach, kind_of_file_system
from launcher.cluster import Profile, SideJob
from launcher.findings import Finding, NotQueued, fine, settle, wrong
from launcher.slurm import partitions as told_by_slurm
from launcher.slurm.batch import JobSpec
from launcher.slurm.limits import check_limits
from launcher.slurm.partitions import NodeGroup, Partition, partitions
from llmtrain import model_files
from llmtrain.config import RunConfig, load_config
from llmtrain.config.model_sections import GPTModel

MOUNTS = r"""
/dev/sda / ext4 rw 0 0
fs:/home /home nfs4 rw 0 0
/dev/sdb /home/local\040disk xfs rw 0 0
x@tcp:/s /scratch lustre rw 0 0
tmpfs /scratch/ram tmpfs rw 0 0
u /sq fuse.squashfuse ro 0 0
u /s3 fuse.goofys rw 0 0
fs:/tmp /tmp/projects nfs rw 0 0
""".strip()


def spec(profile: Profile, **wishes: Any) -> JobSpec:
    return JobSpec("run", Path("/nowhere"), profile, **wishes)


def findings(job: JobSpec, *settings: str) -> list[Finding]:
    config, origins = load_config(None, settings)
    return preflight.check([config], origins, job, "#!/bin/bash\n")


def errors(found: list[Finding]) -> list[str]:
    return [f"{finding.what}: {finding.message}" for finding in found if finding.severity == "error"]


# ---------------------------------------------------------------------------------------------- file systems


@pytest.mark.parametrize(
    ("path", "reach", "kind"),
    [
        ("/home/ada", "shared", "nfs4"),
        ("/home/local disk/runs", "unknown", "xfs"),
        ("/scratch/ada", "shared", "lustre"),
        ("/scratch/ram/x", "node-local", "tmpfs"),
        ("/srv/runs", "unknown", "ext4"),
        ("/tmp/runs", "node-local", "ext4"),
        ("/tmp/projects/runs", "shared", "nfs"),
        ("/sq/x", "unknown", "fuse.squashfuse"),
        ("/s3/x", "shared", "fuse.goofys"),
    ],
)
def test_the_kind_of_file_system_tells_what_all_nodes_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, reach: str, kind: str
):
    monkeypatch.setattr(places, "_MOUNTS", tmp_path / "mounts")
    (tmp_path / "mounts").write_text(MOUNTS)
    assert find_reach(Path(path), [])[0] == reach
    assert kind_of_file_system(Path(path)) == kind


def test_the_profiles_word_counts_for_more(tmp_path: Path):
    assert find_reach(tmp_path / "runs", [tmp_path])[0] == "shared"
    assert find_reach(Path("/home/ada"), [tmp_path])[0] == "node-local"
    (tmp_path / "link").symlink_to("/srv")
    assert find_reach(tmp_path / "link/x", [tmp_path])[0] == "node-local"  # it leads out of there


# ---------------------------------------------------------------------------------------------- partitions

SINFO = """gpu|idle|2|64|512000|gpu:a100:4(S:0-1)|a100
gpu|down*|1|64|512000|gpu:a100:4(S:0-1)|a100
gpu|mixed|1|64|512000|gpu:v100:2,gpu:p100:1|v100
cpu|allocated|9|128|256000|(null)|(null)
empty||0|0|0||
"""
SCONTROL = """PartitionName=gpu AllowAccounts=ALL Default=NO MaxNodes=UNLIMITED MaxTime=2-00:00:00 State=UP
PartitionName=cpu AllowAccounts=physics,math Default=YES MaxNodes=4 MaxTime=UNLIMITED State=UP
PartitionName=empty DenyAccounts=guest Default=NO MaxNodes=UNLIMITED MaxTime=60 State=DRAIN
"""


def test_partitions_are_read_from_sinfo_and_scontrol(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(told_by_slurm, "call", lambda words: SINFO if words[0] == "sinfo" else SCONTROL)
    found = partitions()
    gpu, cpu, empty = found["gpu"], found["cpu"], found["empty"]
    assert (gpu.num_nodes, gpu.gpus_per_node, gpu.num_nodes_with(4), gpu.num_nodes_with(3)) == (4, 4, 3, 4)
    assert (gpu.num_nodes_with(4, up=True), gpu.limit_s, gpu.is_default) == (2, 172_800, False)
    assert (cpu.is_default, cpu.max_nodes, cpu.limit_s, cpu.accounts) == (True, 4, None, ("physics", "math"))
    assert (empty.num_nodes, empty.state, empty.denied_accounts, empty.limit_s) == (0, "DRAIN", ("guest",), 3600)


def test_a_notice_of_the_sites_is_no_partition(monkeypatch: pytest.MonkeyPatch):
    notice = "Maintenance on Monday: see https://hpc.example.org\n\nlogin | news\n"
    monkeypatch.setattr(
        told_by_slurm, "call", lambda words: notice + (SINFO if words[0] == "sinfo" else SCONTROL) + notice
    )
    assert set(partitions()) == {"gpu", "cpu", "empty"}
    assert partitions()["gpu"].num_nodes == 4


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [("(null)", 0), ("gpu:2", 2), ("gpu:2080:8", 8), ("gpu:2080ti:4(S:0,1)", 4), ("craynetwork:4,gpu:a:2,gpu:b:1", 3),
     ("gpu", 1), ("mps:100,shard:4", 0)],
)  # fmt: skip
def test_gpus_are_counted_whatever_they_are_called(monkeypatch: pytest.MonkeyPatch, gres: str, gpus: int):
    said = {"sinfo": f"p|idle|1|8|1000|{gres}|(null)\n", "scontrol": SCONTROL.replace("=gpu ", "=p ")}
    monkeypatch.setattr(told_by_slurm, "call", lambda words: said[words[0]])
    assert partitions()["p"].gpus_per_node == gpus


def partition(name: str = "gpu", **changes: Any) -> Partition:
    nodes = (NodeGroup("idle", 2, 64, 512_000, 4), NodeGroup("drained", 1, 64, 512_000, 4))
    fields: dict[str, Any] = {
        "name": name, "is_default": True, "state": "UP", "limit_s": 3600.0, "max_nodes": None, "accounts": (),
        "denied_accounts": (), "nodes": nodes, **changes,
    }  # fmt: skip
    return Partition(**fields)


def judged(profile: dict[str, Any], known: list[Partition], **wishes: Any) -> dict[str, Finding]:
    settings = {"name": "p", "gpus_per_node": 8, "time": "30", **profile}
    found = check_limits(spec(Profile(**settings), **wishes), {each.name: each for each in known})
    assert len({finding.what for finding in found}) == len(found)
    return {finding.what: finding for finding in found}


def test_a_job_that_fits_is_told_so():
    found = judged({"account": "physics"}, [partition()], nodes=2, gpus_per_node=4)
    assert {finding.severity for finding in found.values()} == {"ok"}
    assert list(found) == ["partition", "nodes", "GPUs", "time limit", "account"]


@pytest.mark.parametrize(
    ("profile", "changes", "asked", "what", "expected"),
    [
        ({"partition": "gqu"}, {}, {}, "partition", "no such partition; did you mean gpu? There are gpu"),
        ({}, {"is_default": False}, {}, "partition", "none is named, and there is no default; use one of gpu"),
        ({}, {"state": "DRAIN"}, {}, "partition", "takes no jobs"),
        ({}, {}, {"nodes": 4}, "nodes", "4 are asked for; gpu has 3"),
        ({}, {"max_nodes": 2}, {"nodes": 3}, "nodes", "gpu has 3, of which a job may have 2"),
        ({}, {}, {"gpus_per_node": 5}, "GPUs", "5 per node are asked for; a node in gpu has 4"),
        ({"gpus_per_node": 2}, {}, {"gpus_per_node": 4}, "profile", "a node has gpus_per_node=2 (profile p)"),
        ({}, {"nodes": ()}, {"gpus_per_node": 1}, "GPUs", "nodes in gpu have none"),
        ({"time": "61"}, {}, {}, "time limit", "61 is too long: gpu allows 1 h 00 min"),
        ({}, {}, {"time": "UNLIMITED"}, "time limit", "UNLIMITED is too long"),
        ({}, {}, {"time": "2"}, "time limit", "the job would save at once"),
        ({"account": "math"}, {"accounts": ("physics",)}, {}, "account", "may not use gpu: it is for physics alone"),
        ({"account": "math"}, {"denied_accounts": ("math",)}, {}, "account", "it is refused there"),
    ],
)  # fmt: skip
def test_what_would_never_start(
    profile: dict[str, Any], changes: dict[str, Any], asked: dict[str, Any], what: str, expected: str
):
    found = judged(profile, [partition(**changes)], **asked)
    assert found[what].severity == "error"
    assert expected in found[what].message


@pytest.mark.parametrize(
    ("profile", "changes", "asked", "what"),
    [
        ({}, {"state": "DOWN"}, {}, "partition"),
        ({}, {}, {"nodes": 3}, "nodes"),
        ({}, {"accounts": ("physics",)}, {}, "account"),
    ],
)
def test_what_only_has_to_wait_is_a_warning(
    profile: dict[str, Any], changes: dict[str, Any], asked: dict[str, Any], what: str
):
    assert judged(profile, [partition(**changes)], **asked)[what].severity == "warning"


def test_a_job_that_may_start_with_fewer_nodes_only_needs_those():
    assert judged({"nodes_at_least": 2}, [partition()], nodes=8)["nodes"].severity == "ok"
    assert judged({"nodes_at_least": 4}, [partition()], nodes=8)["nodes"].severity == "error"


def test_jobs_beside_training_have_limits_of_their_own():
    cpu = partition("cpu", nodes=(NodeGroup("idle", 1, 8, 1000, 0),), is_default=False)
    side = SideJob(partition="cpu", time="50")
    found = judged({"time": "120"}, [partition(), cpu], side=side, gpus_per_node=99)
    assert {finding.severity for finding in found.values()} == {"ok"}
    assert "cpu" in found["partition"].message
    assert judged({}, [partition(), cpu], side=SideJob(partition="cpu", gpus=1))["GPUs"].severity == "error"


def test_of_several_partitions_one_has_to_fit():
    small = partition("small", nodes=(), is_default=False)
    found = judged({"partition": "small,gpu"}, [partition(), small], nodes=2)
    assert {finding.severity for finding in found.values()} == {"ok"}
    assert "gpu" in found["partition"].message


# ---------------------------------------------------------------------------------------------- torch

VERSIONS = {
    "2.9.0+cu128": ("cuda: Optional[str] = '12.8'\nhip: Optional[str] = None", "CUDA 12.8"),
    "2.9.0+rocm6.4": ("cuda: Optional[str] = None\nhip: Optional[str] = '6.4.43483'", "ROCm 6.4.43483"),
    "2.13.0+cpu": ("cuda: Optional[str] = None\nhip: Optional[str] = None", None),
    "1.13.1": ("cuda = '11.7'\nhip = None", "CUDA 11.7"),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_torch_is_read_as_text(tmp_path: Path, version: str):
    lines, accelerator = VERSIONS[version]
    (tmp_path / "version.py").write_text(f"__version__ = '{version}'\ndebug = False\n{lines}\n")
    found = read_torch(tmp_path)
    assert found is not None
    assert (found.version, found.accelerator) == (version, accelerator)


def test_a_python_is_asked_what_it_has(tmp_path: Path):
    here = look_into([sys.executable])
    assert here.prefix == Path(sys.prefix)
    assert here.torch is not None
    assert here.has_llmtrain
    with pytest.raises(OSError, match="No such file"):
        look_into([str(tmp_path / "bin/python")])
    with pytest.raises(OSError, match="ends with 3"):
        look_into(["sh", "-c", "exit 3", "--"])


def fake_python(folder: Path, accelerator: str) -> Path:
    """A virtual environment's python, which says that it has a torch."""
    (folder / "bin").mkdir()
    (folder / "version.py").write_text(f"__version__ = '2.9.0'\ncuda: str = '{accelerator}'\n")
    told = {"version": "3.11.7", "prefix": str(folder), "torch": str(folder / "__init__.py"), "llmtrain": "x"}
    python = folder / "bin/python"
    python.write_text(f"#!/bin/sh\necho '{json.dumps(told)}'\n")
    python.chmod(0o755)
    return python


def test_torch_must_be_able_to_use_the_gpus_that_are_asked_for(tmp_path: Path):
    asked: dict[str, Any] = {"gpus_per_node": 4, "ranks_per_node": 4}
    (refused,) = errors(preflight.check_python(RunConfig(), spec(Profile(gpus_per_node=4), **asked)))
    assert "for CPUs alone" in refused
    fake_python(tmp_path, "12.8")
    profile = Profile(gpus_per_node=4, venv=str(tmp_path), shared=[str(tmp_path)])
    found = preflight.check_python(RunConfig(), spec(profile, **asked))
    assert found == [fine("torch", "2.9.0 for CUDA 12.8, Python 3.11.7")]
    (refused,) = errors(preflight.check_python(RunConfig(), spec(profile, gpus_per_node=2, ranks_per_node=4)))
    assert "one rank for each GPU" in refused


def test_a_venv_that_is_not_there_or_has_no_llmtrain(tmp_path: Path):
    profile = Profile(gpus_per_node=0, venv=str(tmp_path / "venv"))
    (refused,) = errors(preflight.check_python(RunConfig(), spec(profile)))
    assert str(tmp_path / "venv/bin/python") in refused
    (tmp_path / "venv").mkdir()
    python = fake_python(tmp_path / "venv", "12.8")
    python.write_text(python.read_text().replace('"llmtrain": "x"', '"llmtrain": null'))
    (refused,) = errors(preflight.check_python(RunConfig(), spec(profile)))
    assert f"{python} has no llmtrain: install it there" in refused


# ---------------------------------------------------------------------------------------------- all together


def test_all_problems_are_gathered_and_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/manifest.json").write_text("{")
    profile = Profile(gpus_per_node=0, shared=["/elsewhere"])
    found = findings(
        spec(profile, nodes=3), "data.dir=shards", "run.resume=must", "train.device=cuda", "run.dir=/dev/shm/runs"
    )
    with pytest.raises(NotQueued) as caught:
        settle(found, Console())
    names = [problem.split(":")[0] for problem in caught.value.problems]
    assert names == ["SLURM", "shards", "batch", "run folder", "run folder", "torch"]
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith("nothing was queued: 6 problems\n  - SLURM: sbatch: not found")
    shown = capsys.readouterr().out
    assert "warning" in shown  # what is doubtful is shown as well
    assert "error" not in shown


def test_without_an_error_nothing_is_refused(capsys: pytest.CaptureFixture[str]):
    settle([fine("a", "[b] is shown as it is"), Finding("c", "d", "warning")], Console())
    assert capsys.readouterr().out.split() == ["ok", "a", "[b]", "is", "shown", "as", "it", "is", "warning", "c", "d"]
    with pytest.raises(NotQueued, match="1 problem"):
        settle([wrong("a", "b")], Console())


def test_a_number_of_nodes_that_does_not_divide_the_batch_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    profile = Profile(gpus_per_node=2, nodes_at_least=1, shared=[str(tmp_path)])
    (batch,) = [
        f for f in findings(spec(profile, nodes=4, ranks_per_node=2), "train.global_batch_size=8") if f.what == "batch"
    ]
    assert batch.severity == "ok"
    assert batch.message == "8 rows = 8 ranks x 1 x 1; where SLURM gives 3 nodes 1 of them waits"


def test_too_little_room_for_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100_000_000}))
    monkeypatch.chdir(tmp_path)
    (refused,) = [e for e in errors(findings(spec(Profile(gpus_per_node=0, shared=[str(tmp_path)]))))
                  if e.startswith("disk")]  # fmt: skip
    assert "3 checkpoints of 63.9 MB take 191.6 MB; 100.0 MB are free: free some space, or keep fewer" in refused


def test_weights_to_begin_with_have_to_fit_and_be_seen_by_all_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    job, given = spec(Profile(gpus_per_node=0, shared=[str(tmp_path)])), tmp_path / "given"
    start = f"model.start_from={given}"
    assert any("weights: " in error and "no config.json there" in error for error in errors(findings(job, start)))
    given.mkdir()
    model_files.write(given, GPTModel(), 8192, 0)
    (given / "model.safetensors").touch()
    assert any("set model.width=256" in error for error in errors(findings(job, start, "model.width=128")))
    assert not any(error.startswith("weights") for error in errors(findings(job, start)))
    elsewhere = findings(spec(Profile(gpus_per_node=0, shared=["/srv/all"])), start)
    assert any(finding.what == "weights" and finding.severity != "ok" for finding in elsewhere)


def begun(folder: Path, monkeypatch: pytest.MonkeyPatch, config: str) -> Profile:
    """A cluster that sees `folder`, the working directory from here on, where the default run has saved step 100."""
    monkeypatch.chdir(folder)
    run = folder / "runs/stdlib-gpt"
    (run / "checkpoints/step-00000100").mkdir(parents=True)
    (run / "config.yaml").write_text(config)
    return Profile(gpus_per_node=0, shared=[str(folder)])


def test_a_run_that_goes_on_must_have_the_same_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    profile = begun(tmp_path, monkeypatch, "optim: {lr: 0.1}\n")
    (refused,) = [e for e in errors(findings(spec(profile))) if e.startswith("run folder")]
    assert "optim.lr: the run has 0.1, now 0.002" in refused
    found = findings(spec(profile), "optim.lr=0.1")
    assert fine("resume", "from step 100, if that checkpoint verifies") in found


def test_a_run_that_goes_on_keeps_the_precision_that_it_settled_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    profile = begun(tmp_path, monkeypatch, "train: {precision: bf16}\n")
    assert fine("resume", "from step 100, if that checkpoint verifies") in findings(spec(profile))
    (refused,) = [e for e in errors(findings(spec(profile), "train.precision=fp32")) if e.startswith("run folder")]
    assert "train.precision: the run has" in refused


def test_a_run_whose_checkpoints_are_gone_is_not_queued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Training refuses to begin it again, hours later."""
    profile = begun(tmp_path, monkeypatch, "{}\n")
    checkpoints = tmp_path / "runs/stdlib-gpt/checkpoints"
    (checkpoints / "step-00000100").rename(checkpoints / "quarantined-step-00000100")
    (refused,) = [e for e in errors(findings(spec(profile))) if e.startswith("run folder")]
    assert "quarantined-step-00000100 is the newest of 1 in quarantine" in refused
    assert not [e for e in errors(findings(spec(profile), "run.resume=never")) if e.startswith("run folder")]
    (checkpoints / "quarantined-step-00000100").rmdir()
    assert not [e for e in errors(findings(spec(profile))) if e.startswith("run folder")]
    (tmp_path / "runs/stdlib-gpt/saves.jsonl").write_text('{"step": 100}\n')
    (refused,) = [e for e in errors(findings(spec(profile))) if e.startswith("run folder")]
    assert "has saved checkpoints, and none of them is there any more" in refused
