"""The command with which `llmtrain status` says that a run goes on."""

import json
import os
import shlex
import time
from pathlib import Path

import pytest

from launcher.cluster import Profile
from launcher.jobs import JobDir, JobRecord
from launcher.keeper.rules import Rules
from launcher.submitting.order import Order, order_of
from launcher.watching import again
from launcher.watching.status_display import show_status
from llmtrain import origin
from llmtrain.rundir import RunDir
from tests.support.checkpoint_runs import config_of, make_run, save, train
from tests.support.jobs import status_of


def said(run: RunDir) -> str:
    return again.command(run, config_of(run))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """Trained half of its way on this machine, in this folder."""
    monkeypatch.chdir(tmp_path)
    made = make_run(Path("runs/gpt"), "run.name=gpt", "train.steps=300", "service.start=never")
    train(made, 130)
    save(made, 130)
    return made


@pytest.mark.parametrize(
    ("device", "ranks", "how"),
    [("cuda", 8, " --gpus 8"), ("cpu", 4, " --ranks 4"), ("cpu", 1, " --gpus 0"), ("mps", 1, "")],
)
def test_on_this_machine_with_as_many_ranks(run: RunDir, device: str, ranks: int, how: str):
    origin.note(run, device, ranks, ranks)
    assert said(run) == f"llmtrain run runs/gpt/config.yaml{how}"


def test_where_an_older_version_has_not_noted_how_many_ranks(run: RunDir):
    origin.note(run, "cpu", 1, 1)
    noted = {name: value for name, value in json.loads(run.origin.read_text()).items() if name != "ranks"}
    run.origin.write_text(json.dumps(noted))
    assert said(run) == "llmtrain run runs/gpt/config.yaml"


def test_from_another_folder_and_of_a_run_that_was_moved(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    origin.note(run, "cuda", 2, 2)
    (tmp_path / "else where").mkdir()
    monkeypatch.chdir(tmp_path / "else where")
    there = RunDir(Path("../runs/gpt"))
    file = tmp_path / "else where/../runs/gpt/config.yaml"
    assert said(there) == f"cd {tmp_path} && llmtrain run {shlex.quote(str(file))} --gpus 2"
    monkeypatch.chdir(tmp_path)
    moved = RunDir(run.path.rename("kept"))
    settings = f"run.dir={tmp_path} run.name=kept"
    assert said(moved) == f"llmtrain run kept/config.yaml {settings} --gpus 2"


def test_what_began_anew_does_not_do_so_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run = make_run(Path("runs/run"), "run.resume=never", "run.name=run")
    assert said(run) == "llmtrain run runs/run/config.yaml run.resume=auto"


def test_several_machines_without_slurm(run: RunDir):
    origin.note(run, "cuda", 8, 16)
    assert said(run) == "the same command on each of its 2 machines"
    (JobDir.of(run).start("12", 0)).mkdir(parents=True)  # one of slurm/*.sbatch
    assert said(run) == "the same sbatch command"


def test_as_a_job_that_was_submitted_with_these_options(run: RunDir, tmp_path: Path):
    (tmp_path / "big.yaml").write_text("gpus_per_node: 4\n")
    order = order_of(Path("big.yaml"), 2, None, None, "8:00:00")
    add_job(run, *order.options())
    options = f"--cluster {tmp_path}/big.yaml --nodes 2 --gpus-per-node 4 --time 8:00:00"
    assert said(run) == f"llmtrain submit runs/gpt/config.yaml {options}"
    JobDir.of(run).local.mkdir()
    JobDir.of(run).local_lock.touch()  # since then it went on here
    assert said(run) == "llmtrain run runs/gpt/config.yaml"


def test_options_that_are_not_the_usual_ones():
    order = Order(Profile(gpus_per_node=0), Path("/p.yaml"), 1, 0, 3, "", max_restarts=9, hang_s=60)
    assert order.options() == [
        "--cluster", "/p.yaml", "--nodes", "1", "--ranks-per-node", "3", "--max-restarts", "9", "--hang-after", "60",
    ]  # fmt: skip
    assert order.rules == Rules(9, 60, lead_s=120, may_requeue=True)


def test_a_job_of_an_older_version_has_noted_none(run: RunDir):
    add_job(run)
    assert said(run) == "llmtrain submit runs/gpt/config.yaml --cluster FILE --nodes 2"


def test_status_says_it_in_one_line_that_can_be_pasted(
    run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "40")
    origin.note(run, "cuda", 8, 8)
    show_status([run.path], False, False)
    assert "\ngo on        llmtrain run runs/gpt/config.yaml --gpus 8\n" in capsys.readouterr().out
    with run.lock():
        assert status_of(run).again is None
    (run.path / "lock").write_text("process 12 on another-node")  # it may be at work there
    assert status_of(run).again is None
    hours_ago = time.time() - 7200
    os.utime(run.metrics, (hours_ago, hours_ago))
    assert status_of(run).again is not None
    train(run, 300)
    save(run, 300)
    (run.path / "lock").unlink()
    assert (status_of(run).training.state, status_of(run).again) == ("finished", None)


def add_job(run: RunDir, *options: str) -> None:
    JobDir.of(run).add(JobRecord(job_id="12", kind="train", nodes=2, time=time.time() - 60, options=list(options)))
