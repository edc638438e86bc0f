"""A full disk does not keep the service from writing what it deletes by (a save that finds no room: test_room.py)."""

import errno
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmtrain import ledger, log, manifest
from llmtrain.errors import EXIT_REQUEUE, DiskFull
from llmtrain.rundir import RunDir
from llmtrain.service import __main__ as service_command
from llmtrain.service import scoring, worker
from llmtrain.service.children import Pause
from llmtrain.service.reserve import Reserve
from llmtrain.service.validate import write_losses
from llmtrain.service.worker import Service, ServiceOptions
from tests.support.checkpoint_runs import config_of, make_run, save, score, stretches

KEEP_ONE = ("checkpoint.keep_last=1", "checkpoint.keep_best=1")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(log, level, lines.append)
    return lines


def write_score(run: RunDir, step: int) -> dict[str, Any]:
    """What the validator leaves and says."""
    identity = manifest.identity(manifest.read(run.checkpoint(step)))
    write_losses(run.losses(step, identity, "heldout"), stretches(0.1, count=2048))
    told = {"step": step, "checkpoint": identity, "loss": 3.0 - step / 1e4, "perplexity": 20.0}
    return {**told, "bits_per_byte": 1.0, "targets": 9, "epoch": 1.0, "origin": "disk"}


class Validator:
    """In place of the scoring process: has done its work at once."""

    def __init__(self, module: str, arguments: list[str], *_: Any):
        self._said: list[dict[str, Any]] = []
        self.exit_code = 0
        words = arguments[arguments.index("--steps") + 1 :]
        try:
            for step in itertools.takewhile(str.isdecimal, words):
                self._said.append(write_score(RunDir(Path(arguments[0])), int(step)))
        except DiskFull as error:
            self.exit_code = error.exit_code

    def lines(self) -> list[dict[str, Any]]:
        said, self._said = self._said, []
        return said

    def close(self) -> None:
        pass

    end = close


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_AFTER_ERROR_S", 0.0)
    monkeypatch.setattr(worker, "_TURN_S", 0.0)
    monkeypatch.setattr(scoring, "Child", Validator)


def serve(run: RunDir) -> Iterator[Service]:
    lock = run.lock_service()
    assert lock is not None
    with lock:
        service = Service(run, lock, ServiceOptions(drain=True))
        service._scoring.pause = Pause(first_s=0.0)
        yield service


def fill(folder: Path) -> None:
    """To the last byte."""
    with (folder / "of somebody else").open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while file.write(b"x" * size):
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC  # noqa: PT017  which is what is wanted


@pytest.mark.usefixtures("impatient", "said")
def test_checkpoints_that_fill_the_disk_are_scored_and_deleted_all_the_same(small_disk: Path):
    """Nothing may be deleted before it is scored, and there is no room for a score."""
    run = make_run(small_disk / "run", *KEEP_ONE)
    steps = [10, 20, 30, 40, 50]
    for step in steps:
        save(run, step)
    (service,) = serve(run)
    service._reserve.fill(keep_best=1)
    fill(small_disk)
    with pytest.raises(OSError, match="No space left"):
        (run.service / "one more").write_bytes(b"x" * 8192)
    (run.service / "one more").unlink(missing_ok=True)
    for serving in serve(run):
        assert serving.serve() == 0
    assert ledger.scores(run).keys() == set(steps)
    assert run.checkpoint_steps() == [50]
    assert not run.reserve.exists()  # nothing is left to write


def test_a_full_disk_is_told_and_the_reserve_comes_back_with_a_deletion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, impatient: None, said: list[str]
):
    run = make_run(tmp_path / "run", *KEEP_ONE)
    for step in (10, 20, 30):
        save(run, step)
    (before,) = serve(run)
    before.turn()  # there is a status
    errors = iter([OSError(errno.ESTALE, "Stale file handle"), OSError(errno.ENOSPC, "No space left on device")])
    seen: list[tuple[bool, str | None]] = []

    def turn() -> bool:
        status = ledger.status(run)
        assert status is not None
        seen.append((run.reserve.exists(), status.last_error))
        if (error := next(errors, None)) is not None:
            raise error
        return False

    for service in serve(run):
        monkeypatch.setattr(service, "turn", turn)
        assert service.serve() == 0
    tries = "; trying again in 0 s"
    assert seen == [
        (True, None),
        (True, f"OSError: [Errno 116] Stale file handle{tries}"),
        (False, f"OSError: [Errno 28] No space left on device{tries}"),
    ]
    assert any("its reserve is given up" in line for line in said)
    for step, loss in ((10, 3.0), (20, 2.9), (30, 2.8)):
        score(run, step, loss)
    for service in serve(run):
        service._prune(config_of(run), service._inspector.look(config_of(run), scoring=True))
    assert run.checkpoint_steps() == [30]
    assert run.reserve.exists()


def test_a_score_that_finds_no_room_is_given_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, impatient: None):
    """The service itself may have had room for all that it wrote."""

    class Full(Validator):
        def __init__(self, *_: Any):
            self._said, self.exit_code = [], DiskFull.exit_code

    monkeypatch.setattr(scoring, "Child", Full)
    run = make_run(tmp_path / "run", *KEEP_ONE)
    save(run, 10)
    for service in serve(run):
        service._reserve.fill(keep_best=1)
        service.turn()  # starts it
        service.turn()  # collects it
        assert not run.reserve.exists()
        monkeypatch.setattr(scoring, "Child", Validator)
        service.turn()
        service.turn()
        assert not service._scoring.lacks_room
    assert ledger.scores(run).keys() == {10}


def test_the_reserve_has_room_for_as_many_scores_as_it_takes(tmp_path: Path):
    """Before a deletion, with keep_best=4, four of those that wait turn out to be kept."""
    run = make_run(tmp_path / "run")
    run.service.mkdir()
    Reserve(run).fill(keep_best=4)
    save(run, 10)
    write_score(run, 10)
    (losses,) = (run.service / "losses").iterdir()
    assert run.reserve.stat().st_size > 5 * losses.stat().st_size + (64 << 10)


def test_half_a_reserve_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = make_run(tmp_path / "run")
    run.service.mkdir()

    def full(path: Path, content: bytes) -> int:
        os.close(os.open(path, os.O_CREAT))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    Reserve(run).fill(keep_best=1)
    assert not run.reserve.exists()
    assert not Reserve(run).release()


@pytest.mark.parametrize("drain", [True, False])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.ESTALE])
def test_who_waits_for_the_end_is_told_that_the_disk_stays_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, impatient: None, said: list[str], drain: bool, number: int
):
    """Beside training it goes on trying, and while a file system is away."""
    run = make_run(tmp_path / "run")
    run.service.mkdir()
    turns = 0
    lock = run.lock_service()
    assert lock is not None
    with lock:
        service = Service(run, lock, ServiceOptions(drain=drain))

        def turn() -> bool:
            nonlocal turns
            turns += 1
            service.stop_requested = turns == 3 * worker._DRAIN_TRIES
            if turns == 5:
                return True  # a good one: what follows is counted anew
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(service, "turn", turn)
        if drain and number != errno.ESTALE:
            with pytest.raises(OSError, match=os.strerror(number)):
                service.serve()
            assert turns == 5 + worker._DRAIN_TRIES
        else:
            assert service.serve() == EXIT_REQUEUE
    assert any(line.startswith(f"service    {run.service}: ") and os.strerror(number) in line for line in said)


@pytest.mark.parametrize(("number", "code"), [(errno.EACCES, 17), (errno.EROFS, 17), (errno.ENOSPC, 19)])
def test_a_service_that_cannot_write_says_so_at_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, code: int
):
    run = make_run(tmp_path / "run")

    def refused(path: Path, alone: bool) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(log, "set_up", lambda: None)
    monkeypatch.setattr(log, "also_to_file", refused)
    with pytest.raises(SystemExit) as left:
        service_command.main(["--run", str(run.path), "--drain"])
    assert left.value.code == code
    said = capsys.readouterr().err
    assert said.startswith("error: checkpoint service: ")
    assert f"{run.service}" in said
    assert "keep_last" not in said
