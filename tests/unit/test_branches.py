"""A copy of a run folder is a run of its own; a folder that was moved is not."""

import shutil
from pathlib import Path

from llmtrain import ledger, origin, rank0
from llmtrain.resume import fixed_differences
from llmtrain.rundir import RunDir
from tests.support.checkpoint_runs import config_of, make_run


def test_a_copy_gets_an_identity_of_its_own_and_says_what_differs(tmp_path: Path):
    run = make_run(tmp_path / "mine", "run.name=mine", "optim.lr=1e-3")
    origin.note(run, "cpu", 1, 1)
    assert origin.copied_from(run) is None
    copy = RunDir(tmp_path / "slow")
    shutil.copytree(run.path, copy.path)
    assert origin.copied_from(copy) == run
    changed = config_of(make_run(tmp_path / "other", "run.name=slow", "optim.lr=1e-4"))
    assert [key for key, _, _ in fixed_differences(config_of(run), changed)] == ["optim.lr"]  # the name may change
    rank0.note_branch(copy, changed, run)
    [event] = ledger.events(copy)
    assert (event.kind, "optim.lr 0.001 -> 0.0001" in event.message) == ("branched", True)
    first = origin.read(run).id
    origin.note(copy, "cpu", 1, 1)
    assert origin.read(copy).id != first
    assert origin.copied_from(copy) is None
    assert origin.read(run).id == first


def test_a_folder_that_was_moved_stays_the_same_run(tmp_path: Path):
    run = make_run(tmp_path / "mine")
    origin.note(run, "cpu", 1, 1)
    first = origin.read(run).id
    moved = RunDir(run.path.rename(tmp_path / "elsewhere"))
    linked = tmp_path / "link"
    linked.symlink_to(moved.path)
    for place in (moved, RunDir(linked)):
        origin.note(place, "cpu", 1, 1)
        assert origin.read(place).id == first
