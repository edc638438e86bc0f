"""A whole run on a GPU (`pytest --gpu`)."""

import os
from pathlib import Path

import pytest

from llmtrain import ledger
from llmtrain.rundir import RunDir
from tests.support.runs import Workplace, make_workplace
from tests.support.service_runs import run_python, serve, surroundings


def test_what_is_done_on_a_gpu_works_on_the_cpu(tmp_path: Path):
    """So that the next test is known to be whole where there is no GPU."""
    train_resume_and_score(make_workplace(tmp_path), "cpu", surroundings())


@pytest.mark.gpu
def test_a_run_on_a_gpu_resumes_and_is_scored(tmp_path: Path):
    hidden = surroundings()
    del hidden["CUDA_VISIBLE_DEVICES"]
    seen = {name: value for name, value in os.environ.items() if name == "CUDA_VISIBLE_DEVICES"}
    train_resume_and_score(make_workplace(tmp_path), "cuda", {**hidden, **seen})


def train_resume_and_score(work: Workplace, device: str, env: dict[str, str]) -> None:
    settings = ["run.name=here", f"train.device={device}", "train.precision=auto"]
    first = run_python(*work.command(*settings, "train.steps=12")[1:], cwd=work.folder, env=env)
    assert f"1 rank on {device}" in first
    assert "resuming   from step 12" in run_python(*work.command(*settings)[1:], cwd=work.folder, env=env)
    records = work.ledger("here")
    assert [record["step"] for record in records] == list(range(1, 25))
    assert records[-1]["loss"] < records[0]["loss"]
    run = RunDir(work.run_folder("here"))
    serve(run, "--drain", env=env)
    scores = ledger.scores(run)
    assert scores[24].how.startswith(device)
    assert scores[24].loss == pytest.approx(work.ledger("here", "heldout")[-1]["loss"], rel=1e-2)
