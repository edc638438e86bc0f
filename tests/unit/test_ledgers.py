"""Disks that are full, fail or go away: ledgers stay readable, and the service goes on with what can be read."""

import errno
import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from llmtrain import early_stop, files, jsonl, ledger, manifest, origin, rank0, retention, run_start
from llmtrain.config import load_config
from llmtrain.errors import RunFolderError, disk_errors
from llmtrain.ledger import Event
from llmtrain.rundir import RunDir
from llmtrain.service import queue, worker
from llmtrain.service.queue import Inspector
from llmtrain.service.worker import Service, ServiceOptions
from llmtrain.shards import ShardFolder
from tests.support.checkpoint_runs import config_of, make_run, save, score

WHOLE = b'{"step": 1}\n{"step": 2, "text": "\xc3\xa9"}\n'


@contextmanager
def room_for(size_bytes: int) -> Iterator[None]:
    """No file may grow beyond that: a write across it is cut short, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_record_that_the_disk_has_no_room_for_leaves_nothing(tmp_path: Path):
    path = tmp_path / "l.jsonl"
    path.write_bytes(WHOLE)
    with room_for(len(WHOLE) + 20), pytest.raises(OSError, match="File too large"):
        jsonl.append(path, [{"step": 3}, {"step": 4, "text": "x" * 100}])
    assert path.read_bytes() == WHOLE
    jsonl.append(path, [{"step": 3}])
    assert [record["step"] for record in jsonl.read(path)] == [1, 2, 3]


def test_nothing_is_left_where_a_network_disk_says_only_at_closing_that_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "l.jsonl"
    path.write_bytes(WHOLE)
    opened = Path.open

    @contextmanager
    def full(*arguments: str) -> Iterator[object]:
        with opened(*arguments) as file:
            yield file
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(Path, "open", lambda *a, **k: full(*a) if "ab" in a else opened(*a, **k))
    with pytest.raises(OSError, match="quota"):
        jsonl.append(path, [{"step": 3}])
    monkeypatch.undo()
    assert path.read_bytes() == WHOLE


@pytest.mark.parametrize("half", [b'{"st', b'{"text": "\xc3', b'{"text": "' + b"x" * 200_000, b"{}"])
@pytest.mark.parametrize("before", [b"", WHOLE])
def test_half_a_line_is_not_read_and_cut_off_before_the_next_one(tmp_path: Path, before: bytes, half: bytes):
    path = tmp_path / "l.jsonl"
    path.write_bytes(before + half)
    assert [record["step"] for record in jsonl.read(path)] == [1, 2][: before.count(b"\n")]
    jsonl.append(path, [{"step": 3}])
    assert path.read_bytes() == before + b'{"step": 3}\n'
    path.write_bytes(before + half)
    assert jsonl.mend(path) == len(before)
    assert path.read_bytes() == before


@pytest.mark.parametrize("damaged", [b'{"step": 3', b"\xff\xfe", b"\0" * 20, b"7"])
def test_a_damaged_line_is_named(tmp_path: Path, damaged: bytes):
    path = tmp_path / "l.jsonl"
    path.write_bytes(WHOLE + damaged + b"\n" + WHOLE)
    with pytest.raises(RunFolderError, match=r"l\.jsonl: line 3 is damaged .* delete that line"):
        jsonl.read(path)
    assert [record["step"] for record in jsonl.last_records(path, 2)] == [1, 2]
    with pytest.raises(RunFolderError, match=r"l\.jsonl: line 3 from the end is damaged"):
        jsonl.last_records(path, 3)


def test_small_files_that_are_damaged_are_written_anew(tmp_path: Path):
    run = make_run(tmp_path / "run")
    run.service.mkdir()
    for path in (run.origin, run.early_stop):
        path.write_text('{"id": "a"')
    assert early_stop.read(run) is None
    guessed = origin.read(run).id
    assert origin.start_of(run) == Path.cwd()
    origin.note(run, "cpu", 1, 1)
    assert json.loads(run.origin.read_text())["id"] == guessed
    run.base.write_text("{")
    with pytest.raises(RunFolderError, match=r"base\.json: damaged"):
        rank0.check_same_base(run, tmp_path, resuming=True)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_what_may_not_be_written_is_named(tmp_path: Path, number: int):
    file = tmp_path / "metrics.jsonl"
    with pytest.raises(RunFolderError) as raised, disk_errors("run folder", tmp_path):
        raise OSError(number, os.strerror(number), str(file))
    assert str(raised.value).startswith(f"run folder: {tmp_path}: {file}: {os.strerror(number)}. See to it")


def test_a_whole_ledger_is_not_read_for_a_record_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Training's has hundreds of thousands of lines."""
    path = tmp_path / "l.jsonl"
    path.write_bytes(WHOLE)
    read: list[int] = []
    find_end = jsonl._end_of_last_line

    class Counting:
        def __init__(self, file: object):
            self._file = file
            self.seek = file.seek

        def read(self, size: int) -> bytes:
            read.append(size)
            return self._file.read(size)

    monkeypatch.setattr(jsonl, "_end_of_last_line", lambda file, size: find_end(Counting(file), size))
    jsonl.append(path, [{"step": 3}])
    assert read == [1]


def test_the_service_goes_on_with_its_ledgers_after_a_full_disk(tmp_path: Path):
    run = make_run(tmp_path / "run")
    ledger.append(run.service_events, Event(kind="stalled", message="first"))
    with room_for(run.service_events.stat().st_size + 10), pytest.raises(OSError, match="File too large"):
        ledger.append(run.service_events, Event(kind="stalled", message="lost"))
    ledger.append(run.service_events, Event(kind="stalled", message="last"))
    assert [event.message for event in ledger.events(run)] == ["first", "last"]


# Checkpoints that cannot be read


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = make_run(tmp_path / "run", "checkpoint.keep_last=1", "checkpoint.keep_best=1", "service.score=cpu")
    for step in (10, 20, 30):
        save(run, step)
    return run


class Disk:
    """Gives or does not give the bytes of a file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.bad: Path | None = None
        self.asked = 0
        hashed, read = files.sha256, Path.read_bytes
        monkeypatch.setattr(files, "sha256", lambda path: self._give(hashed, path))
        monkeypatch.setattr(Path, "read_bytes", lambda path: self._give(read, path))

    def _give(self, read: Callable[[Path], str | bytes], path: Path) -> str | bytes:
        if path == self.bad:
            self.asked += 1
            raise OSError(errno.EIO, "Input/output error")
        return read(path)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time.monotonic says is this list's only item."""
    now = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("name", ["model/model.safetensors", manifest.NAME])
def test_one_that_cannot_be_read_keeps_no_other_waiting_and_stays(
    run: RunDir, disk: Disk, clock: list[float], name: str
):
    disk.bad = run.checkpoint(20) / name
    inspector = Inspector(run)
    for _ in range(5):
        work = inspector.look(config_of(run), scoring=True)
        assert (sorted(work.whole), work.to_score) == ([10, 30], [10, 30])
    assert disk.asked == 1
    clock[0] += 130
    inspector.look(config_of(run), scoring=True)
    assert disk.asked == 2
    assert run.checkpoint_steps() == [10, 20, 30]
    assert run.quarantined_steps() == []
    (event,) = ledger.events(run)  # said once
    assert (event.kind, event.step) == ("unreadable", 20)
    assert str(disk.bad) in event.message
    assert inspector.waits
    assert str(disk.bad) in (inspector.last_error or "")
    disk.bad = None
    clock[0] += 1000
    assert sorted(inspector.look(config_of(run), scoring=True).whole) == [10, 20, 30]
    assert not inspector.waits
    assert inspector.last_error is None


def test_the_service_does_not_stay_for_ever_for_one_that_cannot_be_read(run: RunDir, disk: Disk, clock: list[float]):
    disk.bad = run.checkpoint(20) / "model/model.safetensors"
    inspector = Inspector(run)
    looks = 0
    while looks == 0 or inspector.waits:
        inspector.look(config_of(run), scoring=True)
        looks, clock[0] = looks + 1, clock[0] + 601
    assert looks == disk.asked == queue._LOOKS


def test_one_that_is_deleted_meanwhile_is_forgotten(run: RunDir, disk: Disk):
    disk.bad = run.checkpoint(20) / "model/model.safetensors"
    inspector = Inspector(run)
    inspector.look(config_of(run), scoring=True)
    retention.remove(run, [20])
    inspector.look(config_of(run), scoring=True)
    assert not inspector.waits


# The service


@pytest.fixture
def service(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setattr(worker, "_AFTER_ERROR_S", 0.0)
    monkeypatch.setattr(worker, "_TURN_S", 0.0)
    lock = run.lock_service()
    assert lock is not None
    with lock:
        yield Service(run, lock, ServiceOptions())


def test_a_file_system_that_is_away_does_not_end_the_service(
    service: Service, run: RunDir, monkeypatch: pytest.MonkeyPatch
):
    turns = iter([OSError(errno.ESTALE, "Stale file handle"), OSError(errno.ESTALE, "Stale file handle"), None])
    away, stat = False, Path.stat

    def turn() -> bool:
        nonlocal away
        error = next(turns)
        away = error is not None
        if error is not None:
            raise error
        return False

    def ask(path: Path, **options: bool) -> os.stat_result:
        if away and path.name == "lock":
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return stat(path, **options)

    monkeypatch.setattr(service, "turn", turn)
    monkeypatch.setattr(Path, "stat", ask)
    assert service.serve() == 0
    assert next(turns, "none left") == "none left"


def test_a_run_folder_that_was_moved_aside_does_end_it(service: Service, run: RunDir):
    run.move_aside()
    assert not service._is_ours()


def test_scores_of_a_former_life_do_not_end_a_restored_run(
    service: Service, run: RunDir, monkeypatch: pytest.MonkeyPatch
):
    """`llmtrain restore REPO RUN --step 10` brings back one checkpoint, and the scores of all."""
    monkeypatch.setattr(RunDir, "is_training", lambda _: True)
    config = load_config(run.config, ["service.patience=2"])[0]

    def is_ended() -> bool:
        service._ask_to_stop(config, service._inspector.look(config, scoring=True))
        return run.early_stop.exists()

    for step, loss in ((10, 3.0), (20, 3.1), (30, 3.2)):
        score(run, step, loss)
    retention.remove(run, [20, 30])
    assert not is_ended()
    for step in (20, 30):
        save(run, step, content="of this life")
        assert not is_ended()
    score(run, 20, 3.1)
    assert not is_ended()
    score(run, 30, 3.2)
    assert is_ended()
    assert ledger.events(run)[-1].step == 30


def test_a_larger_patience_is_asked_anew(service: Service, run: RunDir, monkeypatch: pytest.MonkeyPatch):
    """Training asks once a second, and deletes nothing by asking."""
    monkeypatch.setattr(RunDir, "is_training", lambda _: True)
    for step, loss in ((10, 3.0), (20, 3.1), (30, 3.2), (40, 3.3)):
        save(run, step)
        score(run, step, loss)
    run.early_stop.write_text('{"message": "enough", "saves": 2}')
    asked = [early_stop.asked_to_end(run, patience) for patience in (1, 2, 3, None)]
    assert asked == ["enough", "enough", None, None]
    for patience, told in ((2, "enough"), (3, "the held-out loss has not improved for 3 saves (service.patience=3)")):
        config = load_config(run.config, [f"service.patience={patience}"])[0]
        service._ask_to_stop(config, service._inspector.look(config, scoring=True))
        assert early_stop.asked_to_end(run, patience) == told


def test_saves_that_a_stop_forced_do_not_end_a_run(service: Service, run: RunDir, monkeypatch: pytest.MonkeyPatch):
    """Of a job that is preempted again and again: they lie close together. One of them may be the best all the same."""
    monkeypatch.setattr(RunDir, "is_training", lambda _: True)
    config = load_config(run.config, ["service.patience=2"])[0]

    def is_ended_by(step: int, loss: float, forced: bool) -> bool:
        save(run, step, None if forced else loss)
        score(run, step, loss)
        service._ask_to_stop(config, service._inspector.look(config, scoring=True))
        return run.early_stop.exists()

    score(run, 10, 3.0)
    assert not any(is_ended_by(step, 3.1, forced=True) for step in (11, 12, 13))
    assert not is_ended_by(20, 3.1, forced=False)
    assert not is_ended_by(21, 2.9, forced=True)
    assert not is_ended_by(30, 3.0, forced=False)
    assert not is_ended_by(31, 3.0, forced=True)
    retention.remove(run, [30])  # it counts without its manifest too
    assert is_ended_by(40, 3.0, forced=False)
    asked = early_stop.read(run)
    assert asked is not None
    assert asked.saves == 2


def test_what_a_deletion_had_to_leave_is_deleted_later(service: Service, run: RunDir, clock: list[float]):
    work = service._inspector.look(config_of(run), scoring=True)
    service._prune(config_of(run), work)
    left = run.doomed(5)
    left.mkdir()
    (left / ".nfs0001").write_text("")
    service._prune(config_of(run), work)
    assert left.exists()
    clock[0] += 601
    service._prune(config_of(run), work)
    assert not left.exists()


def test_records_and_replaced_files_are_on_the_disk_before_anything_builds_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A deletion follows the record of an upload: a power cut may not take the record alone."""
    synced: list[tuple[Path, str]] = []
    sync = files.sync

    def note(path: Path) -> None:
        synced.append((path, path.read_text() if path.is_file() else ""))
        sync(path)

    monkeypatch.setattr(files, "sync", note)
    path = tmp_path / "events.jsonl"
    ledger.append(path, Event(kind="stalled", message="said"))
    assert synced == [(path, path.read_text())]
    assert "said" in path.read_text()
    synced.clear()
    files.write_atomic(tmp_path / "status.json", "{}")
    (aside, content), folder = synced  # the bytes before they have the name, and then the name
    assert (aside.parent, content, folder) == (tmp_path, "{}", (tmp_path, ""))
    assert aside.name != "status.json"


def test_a_start_takes_back_what_was_recorded_after_its_checkpoint(tmp_path: Path):
    run = make_run(tmp_path / "run")
    save(run, 5)
    ledgers = (run.metrics, run.heldout, run.samples)
    for path in ledgers:
        jsonl.append(path, [{"step": step, "text": "said"} for step in (5, 6, 7)])
    shards = cast(ShardFolder, SimpleNamespace(fingerprint="f" * 64, path=Path("shards")))
    assert run_start.prepare_run(run, *load_config(run.config), shards, 300) == 5
    assert [{record["step"] for record in jsonl.read(path)} for path in ledgers] == [{5}] * 3
