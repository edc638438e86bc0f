"""How a run ended: a stop that saved, a kill, its plan's end; and what was written at an end that was not the last."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from launcher.report import plots, sections
from launcher.report.markup import Html
from launcher.report.page import write_report
from launcher.watching.queue_view import Job, Queue
from launcher.watching.status import read_status
from llmtrain import assemble, jsonl, ledger, origin, summary
from llmtrain.config import load_config
from llmtrain.finish import finish
from llmtrain.ledger import Event, EventKind
from llmtrain.run_start import prepare_run
from llmtrain.rundir import RunDir
from llmtrain.service.__main__ import work
from llmtrain.service.worker import ServiceOptions
from llmtrain.shards import ShardFolder
from llmtrain.trainer import Parts
from tests.support.checkpoint_runs import make_run, save, score, stretches, train
from tests.support.jobs import status_of

KILLED = "ended without saving at step 130 (killed? out of memory?)"
LOST = f"{KILLED}: steps 101 to 130 are lost; started again, it goes on from step 100"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """130 of 300 steps, the last save at 100."""
    made = make_run(tmp_path / "run", "train.steps=300", "service.start=never")
    note(made, "started", 0)
    train(made, 130)
    save(made, 100)
    return made


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time of a page."""
    monkeypatch.setattr(sections, "picture", lambda name, *_, **__: plots.Picture(name, Html(), b""))


def note(run: RunDir, kind: EventKind, step: int | None = None) -> None:
    ledger.append(run.events, Event(kind=kind, message="said", step=step))


def go_on(run: RunDir, total_steps: int = 300) -> int | None:
    shards = cast(ShardFolder, SimpleNamespace(fingerprint="f" * 64, path=Path("shards")))
    return prepare_run(run, *load_config(run.config), shards, total_steps)


# ---------------------------------------------------------------------------------------------- kills


def test_a_run_that_was_killed_says_what_is_lost(run: RunDir):
    assert status_of(run).problems == [LOST]
    note(run, "resumed", 100)
    note(run, "service-started")
    assert status_of(run).problems == [LOST]
    with run.lock():
        assert status_of(run).problems == []
    assert LOST[1:] in write_report(run).read_text(encoding="utf-8").replace("&#x27;", "'")
    shutil.rmtree(run.checkpoint(100))
    (found,) = status_of(run).problems
    assert found == f"{KILLED}: steps 1 to 130 are lost; started again, it starts from the beginning"


def test_what_ended_otherwise_was_not_killed(run: RunDir):
    note(run, "failed")
    (failed,) = status_of(run).problems
    assert failed.startswith("training failed on ")
    note(run, "resumed", 100)
    note(run, "stopped", 130)
    assert status_of(run).problems == []
    note(run, "resumed", 100)
    save(run, 130)
    assert status_of(run).problems == []


def test_a_process_on_another_machine_gets_time_before_it_counts_as_killed(run: RunDir):
    """Not every shared file system shows its lock, and an evaluation may take longer than the minute after its step."""
    (run.path / "lock").write_text("process 12 on another-node")
    written = run.metrics.stat().st_mtime
    for ago_s, problems in ((0, []), (300, []), (3600, [LOST])):
        os.utime(run.metrics, (written - ago_s, written - ago_s))
        assert status_of(run).problems == problems


@pytest.mark.parametrize(("state", "is_over", "problems"), [("PENDING", False, []), ("OUT_OF_MEMORY", True, [LOST])])
def test_a_job_that_waits_will_go_on_by_itself(run: RunDir, state: str, is_over: bool, problems: list[str]):
    job = Job("7", "train", "mine", 0.0, "", state, is_over, "", "", None, None, was_asked=True)
    queue = cast(Queue, SimpleNamespace(damaged={}, of=lambda _: [job], problem=None))
    assert [p for p in read_status(run, queue).problems if not p.startswith("job 7 ended")] == problems


def test_a_run_that_goes_on_notes_the_kill_and_what_is_done_again(run: RunDir):
    assert go_on(run) == 100
    assert [(e.kind, e.step, e.message) for e in ledger.events(run)][1:] == [
        ("unsaved", 130, KILLED),
        ("resumed", 100, "from step 100; steps 101 to 130 again"),
    ]
    page = write_report(run).read_text(encoding="utf-8")
    assert "On the way: 1 resume and 1 unsaved end." in page
    assert "Ended without saving" in page
    assert go_on(run) == 100  # nothing was done in between
    train(run, 101, every=101)
    note(run, "failed")
    assert go_on(run) == 100
    assert [(e.kind, e.message) for e in ledger.events(run)][3:] == [
        ("resumed", "from step 100"),
        ("failed", "said"),
        ("resumed", "from step 100; step 101 again"),
    ]


def test_a_damaged_event_keeps_no_run_from_going_on(run: RunDir):
    with run.events.open("a") as file:
        file.write("no record\n")
    assert go_on(run) == 100


def test_the_end_of_the_plan_is_no_kill_where_the_last_checkpoint_was_deleted(run: RunDir):
    origin.note(run, "cpu", 1, 1)
    origin.note_finished(run)
    assert go_on(run) == 100
    assert [event.kind for event in ledger.events(run)] == ["started", "resumed"]


def test_a_stop_that_saved_is_an_event(run: RunDir):
    parts = cast(Parts, SimpleNamespace(stop=SimpleNamespace(signal_name="SIGTERM")))
    state = SimpleNamespace(step=130)
    assemble.say_stopped(parts, state, run)  # pyright: ignore[reportArgumentType]
    last = ledger.events(run)[-1]
    assert (last.kind, last.step, last.message) == ("stopped", 130, "by SIGTERM, saved")


# ---------------------------------------------------------------------------------------------- ends that were not


@pytest.fixture
def ended(tmp_path: Path) -> RunDir:
    """A run of 300 steps at its end, with its last files; nothing is scored yet. 200 is the best at its save."""
    made = make_run(tmp_path / "ended", "train.steps=300", "service.start=never", "log.report=false")
    train(made, 300)
    for step, loss in ((100, 3.5), (200, 3.1), (300, 3.15)):
        save(made, step, loss)
    origin.note(made, "cpu", 1, 1)
    origin.note_finished(made)
    summary.write(made, with_curve=False)
    made.report.parent.mkdir()
    made.report.write_text("finished")
    made.curve.write_bytes(b"")
    return made


def test_a_run_at_its_end_leaves_its_gpus_to_its_service(tmp_path: Path):
    run = make_run(tmp_path / "run", "service.start=never")
    origin.note(run, "cuda", 1, 1)
    assert not origin.read(run).finished
    finish(run)
    assert origin.read(run).finished


def best_of(run: RunDir) -> tuple[str, bool]:
    found = json.loads(run.summary.read_text())
    return Path(found["best_checkpoint"]).name, "scored from disk" in found["best_reason"]


def score_all(run: RunDir) -> None:
    for step, shift in ((100, 0.5), (200, 0.2), (300, 0.0)):
        score(run, step, stretches(shift, noise=0.01, seed=step))


def test_what_was_written_at_the_end_goes_when_the_run_goes_on(ended: RunDir):
    files = (ended.summary, ended.curve, ended.report)
    assert go_on(ended, 300) == 300  # nothing is left to do: they will be written again
    assert all(file.exists() for file in files)
    assert go_on(ended, 400) == 300
    assert not any(file.exists() for file in files)


def test_a_page_of_a_run_that_never_ended_stays(run: RunDir):
    write_report(run)
    assert not run.summary.exists()
    go_on(run, 300)
    assert run.report.exists()


def test_a_report_renews_the_summary_of_a_run_that_has_ended(ended: RunDir, monkeypatch: pytest.MonkeyPatch):
    assert best_of(ended) == ("step-00000200", False)
    score_all(ended)
    write_report(ended)
    assert best_of(ended) == ("step-00000300", True)
    monkeypatch.setattr(summary, "_put", lambda *_: pytest.fail("written again, though nothing has changed"))
    monkeypatch.chdir(ended.path)
    write_report(RunDir(Path()))  # from wherever it is looked at


def test_a_service_of_its_own_renews_it_too(ended: RunDir, monkeypatch: pytest.MonkeyPatch):
    score_all(ended)
    monkeypatch.chdir(ended.path)  # restored at the end: a service goes where the run was started
    pages: list[RunDir] = []
    monkeypatch.setattr(summary, "write_report", pages.append)
    assert work(ended, ServiceOptions(only="prune")) == 0
    assert best_of(ended) == ("step-00000300", True)
    assert not pages  # log.report=false
    ended.config.write_text(ended.config.read_text().replace("report: false", "report: true"))
    ended.summary.unlink()
    with ended.lock():  # training goes on
        assert work(ended, ServiceOptions(only="prune")) == 0
    assert not ended.summary.exists()
    assert work(ended, ServiceOptions(only="prune")) == 0
    assert [page.path for page in pages] == [ended.path]
    assert ended.curve.read_bytes().startswith(b"\x89PNG")


def test_a_folder_named_like_a_formula_has_a_curve(tmp_path: Path):
    run = make_run(tmp_path / "$\\x$")
    train(run, 10)
    jsonl.append(run.heldout, [{"step": 10, "epoch": 0.3, "loss": 3.0}])
    summary.draw(run, run.curve)
    assert run.curve.exists()
