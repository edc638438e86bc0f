"""The top of a run's page: what its figures are of."""

import html
import shutil
from pathlib import Path

import pytest

from launcher.report import plots, sections
from launcher.report.facts import read_facts
from launcher.report.markup import Html
from launcher.report.page import write_report
from launcher.watching.queue_view import read_queue
from llmtrain import jsonl, ledger
from llmtrain.ledger import Event
from llmtrain.rundir import RunDir
from llmtrain.tensorboard import TensorBoard
from tests.support import checkpoint_runs
from tests.support.jobs import Slurm, submitted


def page_of(run: RunDir) -> str:
    return html.unescape(write_report(run).read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time of a page."""
    monkeypatch.setattr(sections, "picture", lambda name, *_, **__: plots.Picture(name, Html(), b""))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ((), "6,461 tokens a second while stepping (8,192 overall)"),
        (
            ["data.sources=[{kind: json, paths: [x.json]}]", "data.format={kind: instruction}"],
            "6,461 tokens a second while stepping, prompts included (8,192 learned ones overall)",
        ),
    ],
)
def test_a_rate_says_what_it_counts(tmp_path: Path, settings: list[str], told: str):
    run = checkpoint_runs.make_run(tmp_path / "run", "train.steps=900", *settings)
    checkpoint_runs.train(run, 400)  # 819,200 learned tokens
    written = run.metrics.stat().st_mtime
    ledger.append(run.events, Event(kind="started", message="", step=0, time=written - 100))
    board = TensorBoard(run.tensorboard, first_step=0)
    board.scalars(400, {"speed/tokens_per_s": 6461.0, "speed/step_ms": 1.0})
    board.close()
    assert f"last step 1 min later; {told}" in page_of(run)


def test_a_run_that_has_stopped_says_with_which_command_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run = checkpoint_runs.make_run(Path("runs/gpt"), "train.steps=300", "run.name=gpt")
    checkpoint_runs.train(run, 130)
    said = "Nothing is training here now; it {} with</p><pre>llmtrain run runs/gpt/config.yaml</pre>"
    assert said.format("starts from the beginning") in page_of(run)
    checkpoint_runs.save(run, 100)
    assert said.format("goes on from step 100") in page_of(run)


@pytest.mark.parametrize("queued", ["12|PENDING|Resources||1:00:00|N/A", None])
def test_a_run_whose_job_waits_is_not_to_be_submitted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, queued: str | None
):
    run = checkpoint_runs.make_run(tmp_path / "runs/gpt", "train.steps=300")
    checkpoint_runs.train(run, 130)
    slurm = Slurm(tmp_path / "bin", monkeypatch)
    submitted(run, "12")
    if queued is None:
        slurm.says("squeue", "slurm_load_jobs error", 1)
    else:
        slurm.queued(queued)
    text = page_of(run)
    assert "Nothing is training here now; it may go on by itself" in text
    how = "not known, because SLURM does not answer" if queued is None else "pending, waits for free nodes"
    assert f"job 12 of big (train): {how}" in text
    assert "llmtrain submit" not in text


def test_an_evaluation_before_the_first_step_is_one(tmp_path: Path):
    run = checkpoint_runs.make_run(tmp_path / "run", "train.steps=300")
    checkpoint_runs.train(run, 40)
    jsonl.append(run.heldout, [{"step": 0, "epoch": 0.0, "loss": 6.9086}])
    text = page_of(run)
    assert "6.9086 before the first step" in text
    assert "None since" in text
    assert "No evaluation yet" not in text


def test_evaluations_between_saves_are_not_ranked(tmp_path: Path):
    run = checkpoint_runs.make_run(tmp_path / "run", "train.steps=300", "service.start=never")
    checkpoint_runs.train(run, 300)
    jsonl.append(run.heldout, [{"step": step, "epoch": 1.0, "loss": 4.0 - step / 1000} for step in (0, 50)])
    text = page_of(run)
    assert "Lowest measured 3.9500 (step 50, not saved)" in text
    assert "Nothing to rank yet: no saved checkpoint has a held-out loss." in text
    for step, loss in ((100, 3.5), (200, 3.25), (300, 3.75)):
        checkpoint_runs.save(run, step, loss)
        jsonl.append(run.saves, [{"step": step, "wrote_s": 1.0}])
    jsonl.append(run.heldout, [{"step": 250, "epoch": 8.0, "loss": 3.0}])
    shutil.rmtree(run.checkpoint(100))
    facts = read_facts(run, read_queue([run]))
    assert facts.ranking is not None
    assert [entry.step for entry in facts.ranking.entries] == [100, 200, 300]
    text = page_of(run)
    assert "Lowest of the saved ones 3.2500 at step 200" in text
    assert "lowest measured 3.0000 (step 250, not saved)" in text
    assert text.count("not kept") == 1
