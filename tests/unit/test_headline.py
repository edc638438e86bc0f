"""The top of a run's page: what its figures are of."""

import html
import shutil
from pathlib import Path

import pytest

from launcher.report import plots, sections
from launcher.report.facts import read_facts
from launcher.report.markup import Html
from launcher.report.page import write_report
from llmtrain import jsonl, ledger
from llmtrain.ledger import Event
from llmtrain.rundir import RunDir
from llmtrain.tensorboard import TensorBoard
from tests.support import checkpoint_runs


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
    facts = read_facts(run)
    assert facts.ranking is not None
    assert [entry.step for entry in facts.ranking.entries] == [100, 200, 300]
    text = page_of(run)
    assert "Lowest of the saved ones 3.2500 at step 200" in text
    assert "lowest measured 3.0000 (step 250, not saved)" in text
    assert text.count("not kept") == 1
