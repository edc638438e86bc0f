"""What is deleted, what is held back and why; over any state of a run the newest whole checkpoint stays."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain import checkpoint, jsonl, ledger, manifest, retention, rundir, scoring_place
from llmtrain.config.schema import CheckpointSection
from llmtrain.retention import plan_deletions
from llmtrain.service import plan
from llmtrain.service.queue import Inspector, Work
from llmtrain.service.worker import Service, ServiceOptions
from tests.support.checkpoint_runs import config_of, make_run, save, score, stretches, upload

STEPS = [100, 200, 300, 400, 500]
LOSSES = {100: 3.5, 200: 3.0, 300: 3.1, 400: 3.2, 500: 3.3}


def rule(last: int = 1, best: int = 1, every: int | None = None) -> CheckpointSection:
    return CheckpointSection(keep_last=last, keep_best=best, keep_every=every)


def test_what_the_rule_does_not_keep_is_deleted():
    assert plan_deletions(STEPS, rule(), LOSSES, None, None, 500) == ({100, 300, 400}, {})
    assert plan_deletions(STEPS, rule(last=2, best=2), LOSSES, None, None, 500) == ({100}, {})
    assert plan_deletions(STEPS, rule(every=100), LOSSES, None, None, 500) == (set(), {})


def test_what_is_not_scored_or_not_on_the_hub_is_held_back():
    deleted, held = plan_deletions(STEPS, rule(), LOSSES, [100, 300], [300, 400], 500)
    assert deleted == {300}
    assert held == {100: "not confirmed on the Hub yet", 400: "not scored yet"}


def test_nothing_is_deleted_where_nothing_verifies():
    deleted, held = plan_deletions(STEPS, rule(), LOSSES, None, None, None)
    assert deleted == set()
    assert held == dict.fromkeys([100, 300, 400], "no checkpoint verifies")


def test_newer_ones_that_do_not_verify_protect_what_they_push_out():
    """keep_last=2 means whole ones: 400 and 500 may be damaged."""
    deleted, held = plan_deletions(STEPS, rule(last=2, best=0), LOSSES, None, None, 300)
    assert deleted == {100}
    assert held == {200: "those after step 300 are not verified", 300: "the newest one that verifies"}
    deleted, held = plan_deletions(STEPS, rule(last=1, best=0), LOSSES, None, None, 300)
    assert deleted == {100, 200}
    assert held == {300: "the newest one that verifies", 400: "not verified"}


@st.composite
def situations(draw: st.DrawFn) -> dict[str, object]:
    steps = draw(st.sets(st.integers(1, 30), max_size=10))
    subset = st.sets(st.sampled_from(sorted(steps))) if steps else st.just(set[int]())
    every = draw(st.none() | st.integers(1, 5))
    return {
        "on_disk": steps,
        "rule": rule(draw(st.integers(1, 4)), draw(st.integers(0, 4)), every),
        "losses": {step: draw(st.sampled_from([2.0, 2.5, 3.0])) for step in draw(subset)},
        "scored": draw(st.none() | subset),
        "confirmed": draw(st.none() | subset),
        "verified_newest": draw(st.none() | st.sampled_from(sorted(steps))) if steps else None,
    }


@given(situations())
def test_whatever_the_state_nothing_is_lost(situation: dict):
    deleted, held = plan_deletions(**situation)
    steps, newest = situation["on_disk"], situation["verified_newest"]
    kept_by_rule = retention.to_keep(steps, situation["losses"], situation["rule"])
    assert deleted | set(held) == steps - kept_by_rule  # what the rule would delete is deleted or has a reason
    assert not deleted & set(held)
    assert newest not in deleted
    if newest is None:
        assert not deleted
    else:
        assert all(step < newest for step in deleted)
        whole = {step for step in steps if step <= newest}
        left = sorted(whole - deleted)
        assert left[-situation["rule"].keep_last :] == sorted(whole)[-situation["rule"].keep_last :]
    for known in (situation["scored"], situation["confirmed"]):
        assert known is None or deleted <= known


@given(situations())
def test_deleting_is_done_once(situation: dict):
    """What the rule says of the rest is: keep it."""
    deleted, _ = plan_deletions(**situation)
    again, _ = plan_deletions(**{**situation, "on_disk": situation["on_disk"] - deleted})
    assert again == set()


def test_a_run_s_ledgers_decide(tmp_path: Path):
    run = make_run(tmp_path / "run", "hub.repo=ada/gpt", "checkpoint.keep_last=1", "checkpoint.keep_best=1")
    for step in STEPS:
        save(run, step)
        score(run, step, stretches(step / 1000))
    config = config_of(run)
    assert retention.deletable(run, config, 500) == (
        set(),
        dict.fromkeys([200, 300, 400], "not confirmed on the Hub yet"),
    )
    upload(run, 200, repo="ada/gpt")
    upload(run, 300, repo="ada/other")
    upload(run, 400, repo="ada/gpt")
    upload(run, 400, repo="ada/gpt", removed=True)  # the rule has removed its tag: it was there
    assert retention.deletable(run, config, 500) == ({200, 400}, {300: "not confirmed on the Hub yet"})
    save(run, 200, content="saved again")
    assert retention.deletable(run, config, 500)[1][200] == "not scored yet"
    shutil.rmtree(run.checkpoint(200))
    assert retention.deletable(run, config, 500) == ({400}, {300: "not confirmed on the Hub yet"})


@pytest.mark.parametrize("setting", ["service.start=never", "service.score=training"])
def test_without_scoring_from_disk_nobody_waits_for_it(tmp_path: Path, setting: str):
    run = make_run(tmp_path / "run", setting, "checkpoint.keep_last=1", "checkpoint.keep_best=1")
    for step, loss in LOSSES.items():
        save(run, step, loss)
    score(run, 200, 3.0)
    assert retention.deletable(run, config_of(run), 500) == ({100, 300, 400}, {})


def test_what_was_just_put_into_quarantine_stays_there(tmp_path: Path):
    """Training and the service reject the same checkpoint: the second one finds it gone."""
    run = make_run(tmp_path / "run")
    save(run, 100)
    retention.quarantine(run, 100)
    with pytest.raises(FileNotFoundError):
        retention.quarantine(run, 100)
    assert (run.quarantined(100) / "model/model.safetensors").exists()
    save(run, 100, content="saved again, and bad again")
    retention.quarantine(run, 100)
    assert "saved again" in (run.quarantined(100) / "model/model.safetensors").read_text()
    assert run.checkpoint_steps() == []


def test_a_resume_takes_no_offence_at_a_service_that_was_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = make_run(tmp_path / "run")
    for step in (100, 200, 300):
        save(run, step)
    quarantine = retention.quarantine

    def faster(run: rundir.RunDir, step: int) -> None:
        quarantine(run, step)
        quarantine(run, step)

    monkeypatch.setattr(retention, "quarantine", faster)
    assert checkpoint.discard_after(run, 100) == [200, 300]
    assert (run.checkpoint_steps(), run.quarantined_steps()) == ([100], [200, 300])


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of files that somebody on this machine reads from NFS: they get another name instead of being deleted."""
    names: set[str] = set()
    unlink = os.unlink

    def delete(path: str, *, dir_fd: int | None = None) -> None:
        name = Path(path).name
        if name.startswith(".nfs"):
            if names:
                raise OSError(errno.EBUSY, "Device or resource busy", path)
        elif name in names:
            os.rename(path, Path(path).with_name(".nfs0001"), src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
            return
        unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", delete)
    return names


def test_a_reader_on_nfs_ends_no_deletion(tmp_path: Path, reader: set[str]):
    run = make_run(tmp_path / "run")
    for step in (100, 200, 300):
        save(run, step)
    reader.add("model.safetensors")
    retention.remove(run, [100, 200])
    assert run.checkpoint_steps() == [300]
    save(run, 100)
    retention.remove(run, [100])  # of which something is left from before
    left = list(run.checkpoints.glob(f"{rundir.DOOMED}*"))
    assert len(left) == 3
    assert all([path.name for path in folder.rglob("*") if path.is_file()] == [".nfs0001"] for folder in left)
    reader.clear()
    retention.prune(run, {}, rule())  # training without a service: at its next save
    assert [path.name for path in run.checkpoints.iterdir()] == [run.checkpoint(300).name]


@pytest.mark.parametrize("known", ["saves", "scores", "uploads"])
def test_any_of_its_ledgers_tells_that_a_run_has_saved(tmp_path: Path, known: str):
    """One that came back from the Hub has no saves.jsonl."""
    run = make_run(tmp_path / "run")
    assert retention.why_none_left(run) is None
    records: Path = getattr(run, known)
    records.parent.mkdir(exist_ok=True)
    jsonl.append(records, [{"step": 100}])
    assert "has saved checkpoints, and none of them is there any more" in (retention.why_none_left(run) or "")


def test_a_step_that_was_saved_again_is_verified_scored_and_uploaded_again(tmp_path: Path):
    """Its name is the old one: what is known of that says nothing about it."""
    run = make_run(tmp_path / "run", "hub.repo=ada/gpt", "service.score=cpu")
    for step in (100, 200):
        save(run, step)
        score(run, step, stretches(step / 1000))
        upload(run, step)
    inspector, config = Inspector(run), config_of(run)
    work = inspector.look(config, scoring=True)
    assert (work.to_score, work.to_upload) == ([], [])
    save(run, 200, content="other weights")
    work = inspector.look(config, scoring=True)
    assert (work.to_score, work.to_upload) == ([200], [200])
    assert {step: found.identity for step, found in work.whole.items()} == manifest.identities(run)
    save(run, 100, content="bad weights")
    weights = run.checkpoint(100) / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert sorted(inspector.look(config, scoring=True).whole) == [200]
    assert run.quarantined_steps() == [100]


def test_a_lost_record_of_losses_does_not_delete_the_best(tmp_path: Path):
    """The checkpoints' manifests say them too."""
    run = make_run(tmp_path / "run", "service.start=never", "checkpoint.keep_last=1", "checkpoint.keep_best=1")
    for step, loss in ((100, 3.0), (200, 3.5), (300, 4.0), (400, None)):
        save(run, step, loss)
    for lost in (b"", run.heldout.read_bytes().splitlines(keepends=True)[2]):
        run.heldout.write_bytes(lost)
        assert ledger.heldout_losses(run) == {100: 3.0, 200: 3.5, 300: 4.0}
    retention.prune(run, ledger.heldout_losses(run), config_of(run).checkpoint)
    assert run.checkpoint_steps() == [100, 400]


def test_a_tag_stays_until_its_checkpoint_is_scored(tmp_path: Path):
    """It may turn out to be the best."""
    settings = ["hub.repo=ada/gpt", "hub.prune=true", "checkpoint.keep_last=1", "checkpoint.keep_best=1"]
    run = make_run(tmp_path / "run", *settings)
    for step, shift in ((100, 0.0), (200, 0.2), (300, None), (400, 0.3)):
        save(run, step)
        if shift is not None:
            score(run, step, stretches(shift))
        upload(run, step)
    assert plan.untaggable(run, config_of(run)) == [200]
    score(run, 300, stretches(0.4))
    assert plan.untaggable(run, config_of(run)) == [200, 300]


def test_the_service_deletes_only_what_it_has_verified(tmp_path: Path):
    """What does not verify goes into quarantine instead, for people to look at."""
    run = make_run(tmp_path / "run", "checkpoint.keep_last=1", "checkpoint.keep_best=0", "service.score=training")
    for step in (100, 200, 300):
        save(run, step)
    lock = run.lock_service()
    assert lock is not None
    with lock:
        service = Service(run, lock, ServiceOptions())
        service._prune(config_of(run), Work(whole=cast(Any, dict.fromkeys([200, 300]))))
    assert run.checkpoint_steps() == [100, 300]


def test_prune_deletes_no_more_than_its_preview_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where no GPU is free to score a base on, service.score=auto means training's figures for the moment."""
    run = make_run(tmp_path / "run", "checkpoint.keep_last=1", "checkpoint.keep_best=1")
    for step in (100, 200, 300):
        save(run, step)
        if step != 200:
            score(run, step, stretches(step / 1000))
    monkeypatch.setattr(scoring_place, "find", lambda *_: "training")
    deleted, held = retention.deletable(run, config_of(run), 300)
    lock = run.lock_service()
    assert lock is not None
    with lock:
        assert not Service(run, lock, ServiceOptions(only="prune")).turn()
    assert (deleted, held) == (set(), {200: retention.UNSCORED})
    assert run.checkpoint_steps() == [100, 200, 300]
