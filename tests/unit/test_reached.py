"""What a supervisor remembers of a run folder: how far the run was, and that it was there."""

from pathlib import Path
from typing import Any

import pytest

from launcher.keeper.reached import Reached
from llmtrain import jsonl, ledger
from llmtrain.ledger import Event
from llmtrain.rundir import RunDir
from tests.support.checkpoint_runs import make_run, save


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run")


def test_what_was_there_is_remembered(run: RunDir):
    reached = Reached(run)
    assert (reached.look(), reached.what_is_gone()) == (0, None)
    save(run, 40)
    assert (reached.look(), reached.what_is_gone()) == (40, None)
    moved = run.move_aside()
    assert reached.look() == 0
    assert (reached.what_is_gone() or "").startswith(f"{run.path}: the checkpoints that were here (step 40) are gone")
    moved.rename(run.path)
    assert (reached.look(), reached.what_is_gone()) == (40, None)


def test_what_was_never_there_is_not_gone(tmp_path: Path):
    assert Reached(RunDir(tmp_path / "new")).what_is_gone() is None


def test_a_disk_that_does_not_answer_changes_nothing(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    save(run, 40)
    reached = Reached(run)

    def stale(*_: object) -> bool:
        raise OSError("Stale file handle")

    monkeypatch.setattr(Path, "is_dir", stale)
    monkeypatch.setattr(Path, "exists", stale)
    assert (reached.look(), reached.what_is_gone()) == (40, None)


def test_training_has_begun_where_there_is_another_start(run: RunDir):
    ledger.append(run.events, Event(kind="started", message="old", step=0, time=5000.0))
    reached = Reached(run)
    ledger.append(run.events, Event(kind="restarted", message="a crash", step=0, time=9000.0))
    assert not reached.has_begun(None)
    assert reached.has_begun(since=4999.0)
    assert not reached.has_begun(since=5001.0)
    ledger.append(run.events, Event(kind="resumed", message="new", step=0, time=4000.0))
    assert reached.has_begun(None)
    assert reached.has_begun(since=5001.0)


def test_events_that_cannot_be_read_are_those_of_a_run_that_has_begun(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    """Taken for one that has not, it would be moved aside with all of its checkpoints."""
    ledger.append(run.events, Event(kind="started", message="old", step=0))
    reached = Reached(run)
    assert not reached.has_begun(None)
    with monkeypatch.context() as patched:

        def stale(_: Path) -> list[dict[str, Any]]:
            raise OSError("Stale file handle")

        patched.setattr(jsonl, "read", stale)
        assert reached.has_begun(None)
    assert not reached.has_begun(None)
    with run.events.open("a") as events:
        events.write('{"kind": "star\n')
    assert reached.has_begun(None)
