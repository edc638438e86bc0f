"""Runs of older versions: what this one would not start, read or make so any more, and what can be done with them."""

import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from launcher.checks import preflight
from launcher.cluster import Profile
from launcher.keeper import one_machine
from launcher.keeper.rules import Rules
from launcher.keeper.torchrun import Start
from launcher.slurm.batch import JobSpec
from launcher.slurm.job import TrainJob
from launcher.submitting import submit
from llmtrain import assemble, log, manifest
from llmtrain.config import load_to_start
from llmtrain.errors import CheckpointError, ConfigError, DataMismatch
from llmtrain.run_start import prepare_run
from llmtrain.rundir import RunDir
from llmtrain.shards import ShardFolder
from tests.support.checkpoint_runs import config_of, make_run, save

SAMPLES = ["data.sources=[{kind: json, paths: [x.json]}]", "data.format={kind: instruction, completion_only: false}"]
REFUSED_NOW = [*SAMPLES, "evaluate.task.samples=2"]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = make_run(tmp_path / "runs/old", *REFUSED_NOW, f"run.dir={tmp_path}/runs", "run.name=old")
    save(run, 5)
    return run


def shards(fingerprint: str) -> ShardFolder:
    return cast(ShardFolder, SimpleNamespace(fingerprint=fingerprint, path=Path("shards")))


def go_on(run: RunDir, fingerprint: str, *settings: str) -> int | None:
    names = [f"run.dir={run.path.parent}", f"run.name={run.path.name}"]
    return prepare_run(run, *load_to_start(None, [*SAMPLES, *names, *settings]), shards(fingerprint), 300)


def test_a_run_goes_on_without_what_is_not_started_any_more(run: RunDir):
    with pytest.raises(ConfigError, match=r"goes on with evaluate\.task\.samples=0"):
        go_on(run, "f" * 64, "evaluate.task.samples=2")
    assert config_of(run).evaluate.task.samples == 2
    assert go_on(run, "f" * 64) == 5
    assert config_of(run).evaluate.task.samples == 0


def test_state_that_this_version_does_not_read_is_refused_and_the_run_left_as_it_is(run: RunDir):
    folder = run.checkpoint(5)
    (state,) = (folder / "state").iterdir()
    state.rename(folder / "state/optimizer.safetensors")
    files = manifest.describe_files(
        folder, [folder / "model/model.safetensors", folder / "state/optimizer.safetensors"]
    )
    manifest.write(folder, manifest.read(folder).model_copy(update={"files": files}))
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="written by an older version of llmtrain"):
        go_on(run, "f" * 64)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_shards_of_another_version_are_not_taken_for_other_text_alone(run: RunDir):
    with pytest.raises(DataMismatch) as caught:
        go_on(run, "e" * 64)
    assert "the source text has changed since, or these shards were made by another version of llm" in str(caught.value)
    assert "Bring the old shards back" in str(caught.value)


def test_a_run_whose_configuration_cannot_be_read_is_not_queued(run: RunDir):
    config, origins = load_to_start(None, [*SAMPLES, f"run.dir={run.path.parent}", "run.name=old"])
    run.config.write_text("optim: {speed: 0.1}\n")
    job = JobSpec("run", run.path, Profile(gpus_per_node=0, shared=[str(run.path.parent)]))
    found = preflight.check([config], origins, job, "#!/bin/bash\n")
    (refused,) = [each.message for each in found if each.what == "run folder" and each.severity == "error"]
    assert f"{run.config}: not readable by this version" in refused
    assert "optim.speed" in refused


QUEUED = (
    b"ccopy_reg\n_reconstructor\n(clauncher.slurm.job\nTrainJob\nc__builtin__\nobject\nNtR(dVwords\n(lVa.yaml\nasVranks\nI2\ns"
    b"Vdevice\nVcuda\nsVrules\nccopy_reg\n_reconstructor\n(clauncher.keeper.supervisor\nRules\nc__builtin__\nobject\nNtR("
    b"dVmax_restarts\nI5\nsVhang_s\nF7.0\nsVgrace_s\nF600.0\nsVends_at\nNsVlead_s\nI300\nsVmay_requeue\nI00\nsbs"
    b"Vagain\nI01\nsb."
)
"""A job's pickle, as written by the version before `Rules` held all of a job's limits."""


def test_a_job_that_waits_in_the_queue_across_an_upgrade_still_runs_and_comes_back():
    rules = Rules(max_restarts=5, hang_s=7.0, lead_s=300, may_requeue=True)
    expected = TrainJob(["a.yaml"], 2, "cuda", rules)
    found = pickle.loads(QUEUED)
    assert found == expected
    assert vars(found) == vars(expected)
    assert pickle.loads(pickle.dumps(found)) == expected


STARTS: dict[str, Callable[[list[str]], Any]] = {
    "training": lambda words: assemble.run(None, words),
    "llmtrain run": lambda words: one_machine.train_here(Start(words, 1, None), Rules(0, 0.0)),
    "llmtrain submit": lambda words: submit.plan_runs(words, []),
    "llmtrain submit --sweep": lambda words: submit.plan_runs(words[:-1], [f"{words[-1]},3"]),
}


@pytest.mark.parametrize("start", STARTS)
def test_whatever_starts_a_run_refuses_before_anything_is_made(
    start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(log, "set_up", lambda _: None)
    with pytest.raises(ConfigError, match="does not tell apart; leave one of them out"):
        STARTS[start](REFUSED_NOW)
    assert not [*tmp_path.iterdir()]
