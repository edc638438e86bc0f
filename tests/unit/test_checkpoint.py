"""Checkpoints: whole or absent, every byte guarded, kept by a rule."""

import contextlib
import errno
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmtrain import checkpoint, files, manifest, retention
from llmtrain.checkpoint import CheckpointUnreadable
from llmtrain.config.schema import CheckpointSection
from llmtrain.errors import CheckpointError, DiskFull, is_for_a_person
from llmtrain.fragments import Fragment, FragmentReader
from llmtrain.manifest import FileInfo, Manifest, TrainState
from llmtrain.rundir import RunDir
from llmtrain.saver import HostCopy, Saver
from llmtrain.world import World


class FakeStrategy:
    """Two tensors; enough for what is tested here (runs with real strategies: tests/integration)."""

    def weights(self) -> dict[str, torch.Tensor]:
        return {"w": torch.arange(100.0)}

    def save_state(self) -> list[Fragment]:
        return [Fragment("exp_avg/w", 0, torch.ones(100))]


def write_model(folder: Path, weights: dict[str, torch.Tensor]) -> dict[str, FileInfo]:
    (folder / "model.safetensors").write_bytes(weights["w"].numpy().tobytes())
    (folder / "config.json").write_text("{}")
    return {}


def describe(step: int) -> Manifest:
    return Manifest(
        train_state=TrainState(step=step, samples=8 * step, targets=80 * step),
        seed=1, num_rows=100, global_batch_size=8, fingerprint="f", world_size=1, strategy="ddp",
        heldout_loss=1.0, files={},
    )  # fmt: skip


def make_saver(run: RunDir, write: checkpoint.ModelWriter = write_model, strategy: FakeStrategy | None = None) -> Saver:
    world = World(0, 1, 0, torch.device("cpu"))
    return Saver(run, world, strategy or FakeStrategy(), write, CheckpointSection(), lambda: None)


def save(run: RunDir, step: int, write: checkpoint.ModelWriter = write_model) -> None:
    saver = make_saver(run, write)
    saver.save(describe(step))
    saver.wait()


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    for step in (5, 10):
        save(run, step)
    return run


FILES = ["manifest.json", "model/config.json", "model/model.safetensors", "state/optimizer-00000-of-00001.safetensors"]


def test_a_checkpoint_lists_its_files_and_verifies(run: RunDir):
    read = manifest.verify(run.checkpoint(10))
    assert sorted([*read.files, "manifest.json"]) == FILES
    assert read.train_state.samples == 80
    assert checkpoint.newest_whole(run) == 10


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_flipped_byte_rejects_it_names_the_file_and_takes_the_one_before(
    run: RunDir, name: str, where: str, caplog: pytest.LogCaptureFixture
):
    path = run.checkpoint(10) / name
    content = bytearray(path.read_bytes())
    content[{"first": 0, "middle": len(content) // 2, "last": -1}[where]] ^= 0x20
    path.write_bytes(content)
    assert checkpoint.newest_whole(run) == 5
    with pytest.raises(CheckpointError, match=name.rsplit("/", maxsplit=1)[-1]):
        manifest.verify(run.checkpoint(10))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_truncated_file_rejects_it(run: RunDir, name: str):
    path = run.checkpoint(10) / name
    path.write_bytes(path.read_bytes()[:-1])
    assert checkpoint.newest_whole(run) == 5
    path.unlink()
    assert checkpoint.newest_whole(run) == 5


def test_the_lines_up_to_a_checkpoint_are_on_the_disk_before_it_is(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    """A power loss would leave the checkpoint and take them."""
    for records in (run.metrics, run.heldout):
        records.write_text('{"step": 15}\n')
    sync, synced = files.sync, list[Path]()

    def noting(path: Path) -> None:
        synced.append(path)
        assert not run.checkpoint(15).exists() or path == run.checkpoints
        sync(path)

    monkeypatch.setattr(files, "sync", noting)
    save(run, 15)
    assert {run.metrics, run.heldout, run.path} < set(synced)


def test_nothing_whole_is_an_error_that_says_how_to_go_on(run: RunDir):
    for step in (5, 10):
        (run.checkpoint(step) / "model/config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint verifies.*run\.resume=never"):
        checkpoint.newest_whole(run)


def fail_to_read(monkeypatch: pytest.MonkeyPatch, bad: Path, number: int) -> None:
    """Reading that file fails, with an error that does not name it."""
    error = OSError(number, "the disk says no")

    def give(read: Callable[[Path], str | bytes], path: Path) -> str | bytes:
        if path == bad:
            raise error
        return read(path)

    hashed, read = files.sha256, Path.read_bytes
    monkeypatch.setattr(files, "sha256", lambda path: give(hashed, path))
    monkeypatch.setattr(Path, "read_bytes", lambda path: give(read, path))


@pytest.mark.parametrize("name", ["manifest.json", "model/model.safetensors"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EMFILE, errno.EACCES])
def test_a_disk_that_fails_says_nothing_about_a_checkpoint(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, name: str, number: int
):
    fail_to_read(monkeypatch, run.checkpoint(10) / name, number)
    with pytest.raises(OSError, match="the disk says no") as caught:
        manifest.verify(run.checkpoint(10))
    assert caught.value.filename == str(run.checkpoint(10) / name)


@pytest.mark.parametrize("name", ["manifest.json", "model/model.safetensors"])
def test_a_resume_does_not_go_on_from_an_older_one_because_the_disk_fails(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, name: str
):
    fail_to_read(monkeypatch, run.checkpoint(10) / name, errno.EIO)
    with pytest.raises(CheckpointUnreadable, match=f"step-00000010/{name}.*the same command goes on") as caught:
        checkpoint.newest_whole(run)
    assert run.checkpoint_steps() == [5, 10]
    # Started again by `llmtrain run`, which it does not after what is for a person.
    assert not is_for_a_person(caught.value.exit_code)


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_place_of_a_file_rejects_it(run: RunDir, name: str):
    (run.checkpoint(10) / name).unlink()
    (run.checkpoint(10) / name).mkdir()
    assert checkpoint.newest_whole(run) == 5


def test_a_file_in_place_of_the_folder_rejects_it(run: RunDir):
    shutil.rmtree(run.checkpoint(10))
    run.checkpoint(10).write_text("")
    assert checkpoint.newest_whole(run) == 5


def test_rejected_and_half_written_folders_get_out_of_the_way(run: RunDir):
    shutil.copytree(run.checkpoint(10), run.checkpoints / ".writing-step-00000015")
    shutil.copytree(run.checkpoint(10), run.checkpoints / ".deleting-step-00000001")
    checkpoint.discard_after(run, 5)
    checkpoint.remove_leftovers(run)
    retention.remove_leftovers(run)
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["quarantined-step-00000010", "step-00000005"]


def test_a_failed_save_leaves_nothing(run: RunDir):
    def broken(folder: Path, weights: dict[str, torch.Tensor]) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(DiskFull, match="No space left on device"):
        save(run, 15, broken)
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step-00000005", "step-00000010"]


@given(
    steps=st.sets(st.integers(1, 60), min_size=1, max_size=30),
    scores=st.dictionaries(st.integers(1, 60), st.floats(0, 10)),
    last=st.integers(1, 4),
    best=st.integers(0, 4),
    every=st.one_of(st.none(), st.integers(1, 10)),
)
def test_the_rule_keeps_exactly_what_it_says(steps, scores, last, best, every):
    kept = retention.to_keep(sorted(steps), scores, CheckpointSection(keep_last=last, keep_best=best, keep_every=every))
    ordered = sorted(steps)
    scored = [s for s in ordered if s in scores]
    for step in ordered:
        newer = sum(other > step for other in ordered)
        better = sum((scores[other], other) < (scores[step], step) for other in scored) if step in scores else best
        wanted = newer < last or better < best or (every is not None and step % every == 0)
        assert (step in kept) == wanted


def test_what_is_saved_is_the_state_when_the_save_began(run: RunDir):
    """Training goes on while a thread writes: the tensors change under it."""

    class Training(FakeStrategy):
        moment = torch.ones(100)

        def save_state(self) -> list[Fragment]:
            return [Fragment("exp_avg/w", 0, self.moment)]

    writing, go_on = threading.Event(), threading.Event()

    def slow(folder: Path, weights: dict[str, torch.Tensor]) -> dict[str, FileInfo]:
        writing.set()
        assert go_on.wait(10)
        return write_model(folder, weights)

    strategy = Training()
    saver = make_saver(run, slow, strategy)
    saver.save(describe(15))
    assert saver.until_copied() is not None
    strategy.moment.zero_()
    assert writing.wait(10)
    assert 15 not in run.checkpoint_steps()
    go_on.set()
    saver.wait()
    saved = FragmentReader(manifest.verify(run.checkpoint(15)) and run.checkpoint(15) / "state")
    assert saved.read("exp_avg/w", 0, 100).sum() == 100


def test_nothing_may_change_before_it_has_been_copied(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    copying, go_on = threading.Event(), threading.Event()
    copy = HostCopy._copy

    def slow(self: HostCopy) -> None:
        copying.set()
        assert go_on.wait(10)
        copy(self)

    monkeypatch.setattr(HostCopy, "_copy", slow)
    saver = make_saver(run)
    saver.save(describe(15))
    assert copying.wait(10)
    waited: list[float | None] = []
    training = threading.Thread(target=lambda: waited.append(saver.until_copied()))
    training.start()
    training.join(0.3)
    assert training.is_alive()
    go_on.set()
    training.join(10)
    assert waited[0] is not None
    assert waited[0] > 0.1
    assert saver.until_copied() is None  # told once
    saver.wait()
    assert 15 in run.checkpoint_steps()


def test_a_copy_that_fails_does_not_leave_training_waiting(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    def broken(self: HostCopy) -> None:
        raise MemoryError

    monkeypatch.setattr(HostCopy, "_copy", broken)
    saver = make_saver(run)
    saver.save(describe(15))
    saver.until_copied()
    with pytest.raises(MemoryError):
        saver.wait()


def test_a_failed_save_is_raised_by_the_next_one_too(run: RunDir):
    def broken(folder: Path, weights: dict[str, torch.Tensor]) -> None:
        raise OSError(28, "No space left on device")

    saver = make_saver(run, broken)
    saver.save(describe(15))
    with pytest.raises(DiskFull):
        saver.save(describe(20))


def test_pruning_deletes_the_others(run: RunDir):
    for step in (15, 20):
        save(run, step)
    retention.prune(run, {5: 0.5, 10: 2.0, 15: 1.0, 20: 3.0}, CheckpointSection(keep_last=1, keep_best=1))
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step-00000005", "step-00000020"]


def test_all_of_it_is_on_the_disk_before_it_has_its_name(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    """A power cut leaves a whole checkpoint, or none: the name is given last, and then synced too."""
    done: list[Path] = []
    sync, rename = files.sync, Path.rename

    def note(path: Path) -> None:
        done.append(path)
        sync(path)

    def move(path: Path, target: Path) -> Path:
        done.append(target)
        return rename(path, target)

    monkeypatch.setattr(files, "sync", note)
    monkeypatch.setattr(Path, "rename", move)
    save(run, 15)
    named = done.index(run.checkpoint(15))
    folder = checkpoint.aside(run, 15)
    model = {folder / "model/config.json", folder / "model/model.safetensors"}
    assert {*model, folder / "model", folder / "state", folder} <= set(done[:named])
    described = next(number for number, path in enumerate(done) if path.name.startswith(".manifest.json"))
    assert not model & set(done[described:])  # the manifest is written last
    assert run.checkpoints in done[named:]


class Ranks(World):
    """Rank 0 of several, whose others have written their shares."""

    def post(self, name: str, message: dict[str, Any]) -> None:
        pass

    def wait_for(self, name: str) -> dict[str, Any]:
        return {"files": {}}


@pytest.mark.parametrize(("missing", "saved"), [(0, [5, 10, 15]), (1, [5, 10])])
def test_there_is_room_for_the_shares_of_all_ranks_before_anything_is_written(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, missing: int, saved: list[int]
):
    """100 weights and, on each of three ranks, 100 moments, of four bytes."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=400 + 3 * 400 - missing))
    world = Ranks(0, 3, 0, torch.device("cpu"))
    saver = Saver(run, world, FakeStrategy(), write_model, CheckpointSection(), lambda: None)
    saver.save(describe(15))
    with pytest.raises(DiskFull, match="has only 0 MB free") if missing else contextlib.nullcontext():
        saver.wait()
    assert run.checkpoint_steps() == saved
    assert not checkpoint.aside(run, 15).exists()
