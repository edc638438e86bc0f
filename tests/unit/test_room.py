"""A save that finds no room on the disk waits for what the checkpoint service will delete."""

import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmtrain import checkpoint, ledger, log
from llmtrain.config import load_config
from llmtrain.config.schema import CheckpointSection
from llmtrain.errors import DiskFull
from llmtrain.retention import Held
from llmtrain.rundir import RunDir
from llmtrain.saver import Saver
from llmtrain.service import beside
from llmtrain.service.beside import Companion
from llmtrain.world import World
from tests.support.checkpoint_runs import config_of, make_run, save, score, stretches, upload
from tests.unit.test_checkpoint import FakeStrategy, describe, write_model

SIX = "of the checkpoints there 6 wait to be scored"
KEEP_ONE = ("checkpoint.keep_last=1", "checkpoint.keep_best=1")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(log, level, lines.append)
    return lines


class Disk:
    """`free` bytes, and `later` ones after so many looks."""

    def __init__(self, free: int, later: int, looks: int):
        self._free, self._later, self._looks = free, later, looks

    def usage(self, _: Path) -> SimpleNamespace:
        self._looks -= 1
        return SimpleNamespace(free=self._free if self._looks >= 0 else self._later)


@pytest.fixture
def hours(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Each pause between two looks takes 100 s."""
    now = [0.0]

    def sleep(_: float) -> None:
        now[0] += 100

    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    return now


def saver_of(run: RunDir, held: Held, world: World | None = None) -> Saver:
    alone = world or World(0, 1, 0, torch.device("cpu"))
    return Saver(run, alone, FakeStrategy(), write_model, CheckpointSection(), lambda: None, lambda: held)


def made(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    return run


def test_a_save_waits_for_what_the_service_will_delete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: list[float], said: list[str]
):
    run = made(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", Disk(free=10, later=10_000, looks=8).usage)
    saver = saver_of(run, Held(SIX, 3600.0))
    saver.save(describe(5))
    saver.wait()
    assert run.checkpoint_steps() == [5]
    assert hours[0] > 100
    (waits,) = (line for line in said if "waits" in line)
    assert "saving     waits for room, up to 3,600 s: 0 MB for a checkpoint and 0 to spare, 0 MB are free in" in waits
    assert waits.endswith(f"{run.checkpoints}; {SIX}")
    assert any("there is room again" in line for line in said)


@pytest.mark.parametrize(("later", "waited_s"), [(1600, 100), (1599, 3600)])
def test_it_leaves_room_for_the_records_of_the_next_steps_if_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: list[float], later: int, waited_s: float
):
    run = made(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", Disk(free=800, later=later, looks=2).usage)
    saver = saver_of(run, Held(SIX, 3600.0))
    saver.save(describe(5))
    saver.wait()
    assert hours[0] == waited_s
    assert run.checkpoint_steps() == [5]


@pytest.mark.parametrize(
    ("held", "waited_s", "told"),
    [
        (Held("", 3600.0), 0, "free some space or keep fewer"),
        (Held(SIX, 0.0), 0, f"{SIX}. Free some space, save less often"),
        (Held(SIX, 250.0), 300, rf"{SIX} \(waited 300 s\)"),
    ],
)
def test_it_does_not_wait_for_nothing_nor_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: list[float], held: Held, waited_s: float, told: str
):
    run = made(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    saver = saver_of(run, held)
    saver.save(describe(5))
    with pytest.raises(DiskFull, match=told):
        saver.wait()
    assert hours[0] == waited_s
    assert run.checkpoint_steps() == []


def test_what_lies_beside_the_tensors_is_counted_from_the_second_save_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Tokenizer and headers: a save that begins with too little room for them would fail in its middle."""
    run = made(tmp_path)
    saver = saver_of(run, Held("", 0.0))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=800))  # the tensors of FakeStrategy
    saver.save(describe(5))
    saver.save(describe(10))
    with pytest.raises(DiskFull, match="free some space or keep fewer"):
        saver.wait()
    assert run.checkpoint_steps() == [5]


class Rank(World):
    """One of two, whose messages are kept."""

    posted: dict[str, Any]
    answers: dict[str, Any]

    def post(self, name: str, message: dict[str, Any]) -> None:
        self.posted[name] = message

    def wait_for(self, name: str) -> dict[str, Any]:
        return self.answers[name]


@pytest.mark.parametrize("found", [True, False])
def test_other_ranks_write_only_when_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: bool):
    run = made(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000 if found else 10))
    other = Rank(1, 2, 1, torch.device("cpu"))
    other.posted, other.answers = {}, {"room-5": {"found": found}, "saved-5": {} if found else {"exit_code": 19}}
    saver = saver_of(run, Held("", 0.0), other)
    saver.save(describe(5))
    if found:
        saver.wait()
    else:
        with pytest.raises(SystemExit, match="19"):
            saver.wait()
    share = checkpoint.aside(run, 5) / "state/optimizer-00001-of-00002.safetensors"
    assert share.exists() == found
    assert len(other.posted["share-5-1"]["files"]) == found

    first = Rank(0, 2, 0, torch.device("cpu"))
    first.posted, first.answers = {}, {"share-5-1": other.posted["share-5-1"]}
    saver = saver_of(run, Held("", 0.0), first)
    saver.save(describe(5))
    if found:
        saver.wait()
    else:
        with pytest.raises(DiskFull):
            saver.wait()
    assert first.posted == {"room-5": {"found": found}, "saved-5": {} if found else {"exit_code": 19}}


def test_what_is_on_its_way_out(tmp_path: Path):
    run = make_run(tmp_path / "run", *KEEP_ONE, "hub.repo=ada/gpt")

    def held() -> str:
        return beside.on_the_way_out(run, config_of(run))

    assert held() == ""
    save(run, 10)
    score(run, 10, stretches(0.1))
    save(run, 20)
    assert held() == ""  # the best one and the last one
    for step in (30, 40, 50):
        save(run, step)
    assert held() == "of the checkpoints there 3 wait to be scored"
    score(run, 20, stretches(0.0))  # better than 10
    score(run, 30, stretches(0.2))
    assert held() == "of the checkpoints there 1 wait to be scored, 2 wait to be uploaded"
    upload(run, 10)
    run.doomed(5).mkdir()
    assert held().endswith("1 wait to be scored, 1 wait to be uploaded, 2 are about to be deleted")


def test_nobody_waits_for_what_will_not_come(tmp_path: Path):
    run = make_run(tmp_path / "run", *KEEP_ONE, "hub.repo=ada/gpt")
    for step in (10, 20, 30):
        save(run, step)
    score(run, 10, stretches(0.1))
    score(run, 20, stretches(0.2))
    later = time.time() + 10
    status = ledger.Status(pid=1, host="h", time=later, doing=["scoring step 30"], to_score=[30], last_error="E")
    ledger.write(run.service_status, status)
    assert beside.on_the_way_out(run, config_of(run)) == "of the checkpoints there 1 wait to be uploaded; E"
    ledger.write(run.service_status, status.model_copy(update={"problem": "the Hub refuses"}))
    assert beside.on_the_way_out(run, config_of(run)) == ""
    config = load_config(run.config, ["hub.repo=null"])[0]
    run.scores.unlink()  # saves that a stop forced: where training scores, nobody measures them any more
    assert beside.on_the_way_out(run, config) == "of the checkpoints there 2 wait to be scored; E"
    nothing_to_do = {"doing": [], "to_score": [], "last_error": None}
    ledger.write(run.service_status, status.model_copy(update=nothing_to_do))
    assert beside.on_the_way_out(run, config) == ""
    ledger.write(run.service_status, status.model_copy(update={**nothing_to_do, "time": 0.0}))  # it has not looked
    assert beside.on_the_way_out(run, config) == "of the checkpoints there 2 wait to be scored"


def test_it_waits_where_a_service_is_at_work_and_not_long_after_a_stop(tmp_path: Path):
    run = make_run(tmp_path / "run", *KEEP_ONE, "service.wait_s=500")
    for step in (10, 20, 30):
        save(run, step)
    companion = Companion(run, config_of(run))
    told = companion.held(hurry=False)
    assert told.wait_s == 0
    assert "2 wait to be scored, and no service is at work on them (python -m llmtrain.service --run" in told.why
    lock = run.lock_service()
    assert lock is not None
    with lock:
        assert companion.held(hurry=False) == Held("of the checkpoints there 2 wait to be scored", 500.0)
        assert companion.held(hurry=True).wait_s == 30.0
