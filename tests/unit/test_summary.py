"""What a run is said to have come to, and what TensorBoard is given."""

import itertools
import json
import shutil
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.axes import Axes

from launcher.choosing import checkpoints, listing
from llmtrain import jsonl, overfitting, ranking, summary, tensorboard
from llmtrain.generate import find_model
from llmtrain.hardware import HardwareMeter
from llmtrain.ledger import drain_command
from llmtrain.rundir import RunDir
from llmtrain.tensorboard import Event, TensorBoard
from tests.support import checkpoint_runs
from tests.support.checkpoint_runs import save, score, stretches


def make_run(tmp_path: Path, heldout: list[float]) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    for i, loss in enumerate(heldout):
        jsonl.append(run.heldout, [{"step": 10 * i, "epoch": i / 2, "loss": loss, "train_loss": 5.0 - i}])
        if i:
            save(run, 10 * i, loss=None)
            record = {"step": 10 * i, "epoch": i / 2, "loss": 5.0 - i, "targets": 100 * i}
            jsonl.append(run.metrics, [record])
    return run


def test_a_rise_of_which_nothing_is_scored_is_named_as_doubtful(tmp_path: Path):
    run = make_run(tmp_path, [9.0, 7.0, 6.0, 6.2, 6.5])
    found = summary.write(run, with_curve=True)
    assert found is not None
    assert (found.overfits, found.lowest_step, found.first_heldout, found.last_heldout) == (None, 20, 9.0, 6.5)
    text = summary.describe(run, found)
    assert "perhaps since step 20 (epoch 1.00): the held-out loss rose by 8.3%" in text
    assert f"not known whether that is chance (nothing scored from disk: {drain_command(run.path)})" in text
    assert f"use checkpoint  {run.checkpoint(20)} (held-out loss 6.0000, scored at the save)" in text
    assert "tensorboard --logdir" in text
    assert json.loads(run.summary.read_text())["best_checkpoint"] == str(run.checkpoint(20))
    assert run.curve.read_bytes().startswith(b"\x89PNG")


def test_the_last_measured_loss_is_not_said_to_be_that_of_the_end(tmp_path: Path):
    """Where the run was stopped, or went on after it without another evaluation."""
    run = make_run(tmp_path, [9.0, 7.0])
    found = summary.summarise(run)
    assert found is not None
    assert "9.0000 at the start -> 7.0000 at the end, lowest" in summary.describe(run, found)
    jsonl.append(run.metrics, [{"step": 14, "epoch": 0.7, "loss": 3.0, "targets": 140}])
    found = summary.summarise(run)
    assert found is not None
    assert "9.0000 at the start -> 7.0000 at step 10, lowest" in summary.describe(run, found)


def test_its_commands_can_be_copied_whatever_the_folder_is_called(tmp_path: Path):
    run = make_run(tmp_path / "my runs", [9.0, 7.0])
    found = summary.write(run, with_curve=False)
    assert found is not None
    text = summary.describe(run, found)
    assert f"llmtrain generate '{run.checkpoint(10)}'\n" in text
    assert text.endswith(f"tensorboard --logdir '{tmp_path}/my runs'")
    assert drain_command(run.path) == f"python -m llmtrain.service --run '{run.path}' --drain"


def test_a_curve_of_an_earlier_end_does_not_stay_beside_a_newer_summary(tmp_path: Path):
    run = make_run(tmp_path, [9.0, 7.0])
    run.curve.write_text("of the run's earlier life")
    found = summary.write(run, with_curve=False)
    assert found is not None
    assert not run.curve.exists()
    assert "\ncurves " not in summary.describe(run, found)


def test_a_lowest_loss_that_was_not_saved_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On the curve the lowest of the saved ones is marked as well."""
    run = make_run(tmp_path, [9.0, 7.0, 6.0, 6.25])
    found, marks = summary.write(run, with_curve=True), list[str]()
    assert found is not None
    assert "not saved" not in summary.describe(run, found)
    shutil.rmtree(run.checkpoint(20))
    assert "lowest 6.0000 at step 20 (epoch 1.00, not saved)" in summary.describe(run, found)
    monkeypatch.setattr(Axes, "annotate", lambda axes, text, *_, **__: marks.append(text))
    summary.draw(run, run.curve)
    assert marks == ["lowest 6.000\nstep 20", "lowest saved 6.250\nstep 30"]


def test_no_overfitting_where_there_is_none(tmp_path: Path):
    run = make_run(tmp_path, [9.0, 7.0, 6.0, 6.01])
    found = summary.summarise(run)
    assert found is not None
    assert not found.overfits
    assert "none seen" in summary.describe(run, found)


def test_one_measurement_says_nothing_of_overfitting(tmp_path: Path):
    run = checkpoint_runs.make_run(tmp_path / "run")
    checkpoint_runs.train(run, 300)
    save(run, 300, 3.0)
    found = summary.summarise(run)
    assert found is not None
    assert "\nheld-out loss   3.0000 at step 300 (measured once)\n" in summary.describe(run, found)
    assert "not known: the held-out loss was measured once" in summary.describe(run, found)
    score(run, 300, stretches(0.0))
    ranked = ranking.rank(run)
    assert ranked is not None
    assert overfitting.judge(ranked).describe() == "not known: it takes two checkpoints with a held-out loss"


@pytest.mark.parametrize(("rise", "noise", "began"), [(0.025, 0.005, True), (0.1, 2.0, False)])
def test_overfitting_is_what_the_ranking_says(tmp_path: Path, rise: float, noise: float, began: bool):
    """A rise of 0.8% that chance does not explain, and one of 3% that it does: training's evaluations with their 1%
    say the opposite of both."""
    run = checkpoint_runs.make_run(tmp_path / "run")
    checkpoint_runs.train(run, 300)
    for step, shift in ((100, 0.3), (200, 0.0), (300, rise)):
        save(run, step, 3.0 + shift)
        score(run, step, stretches(shift, noise=noise, seed=step))
    found, ranked = summary.summarise(run), ranking.rank(run)
    assert found is not None
    assert ranked is not None
    assert found.overfits is began
    assert f"\noverfitting     {overfitting.judge(ranked).describe()}\n" in summary.describe(run, found)


def test_the_best_checkpoint_is_one_that_still_exists(tmp_path: Path):
    run = make_run(tmp_path, [9.0, 6.0, 7.0, 8.0])
    shutil.rmtree(run.checkpoint(10))
    found = summary.summarise(run)
    assert found is not None
    assert found.lowest_step == 10
    assert found.best_checkpoint == str(run.checkpoint(20))


def test_it_proposes_what_checkpoints_does_or_says_why_not(tmp_path: Path):
    run = checkpoint_runs.make_run(tmp_path / "run")
    checkpoint_runs.train(run, 300)
    for step, loss in ((100, 4.0), (200, 5.3), (300, 5.25)):
        save(run, step, 5.5)
        score(run, step, loss)
    checkpoint_runs.upload(run, 100)

    def both() -> tuple[str, str, float | None, int, str]:
        found, listed = summary.summarise(run), listing.gather(run)
        assert found is not None
        assert found.best_checkpoint is not None
        assert listed.proposed is not None
        path = found.best_checkpoint
        assert str(find_model(run.path)) == f"{path}/model"
        return path, found.best_reason, found.best_checkpoint_heldout, listed.proposed.step, listed.why

    for step in (100, 200, 300):
        (run.checkpoint(step) / "model" / "config.json").write_text("{}")
    path, reason, loss, step, why = both()
    assert (path, loss, step) == (str(run.checkpoint(100)), 4.0, 100)
    assert reason.endswith(f": {why}")
    shutil.rmtree(run.checkpoint(100))
    path, reason, loss, step, _ = both()
    assert (path, loss, step) == (str(run.checkpoint(300)), 5.25, 100)
    told = "; step 100, which 'llmtrain checkpoints' proposes, is on the Hub alone"
    assert reason == f"scored at the save: the lowest held-out loss of those on disk{told}"
    save(run, 200, 5.5, content="again")
    shutil.rmtree(run.checkpoint(300))
    (run.checkpoint(200) / "model" / "config.json").write_text("{}")
    assert both()[:2] == (
        str(run.checkpoint(200)),
        f"scored at the save: the lowest held-out loss that training computed of those on disk{told}",
    )
    checkpoint_runs.upload(run, 100, removed=True)
    path, reason, loss, step, why = both()
    assert (path, loss, step) == (str(run.checkpoint(200)), 5.5, 200)
    assert reason == f"scored at the save: {why}"
    assert why.endswith("; none is left of those that were scored from disk")


def test_whoever_takes_the_best_one_is_told_what_may_still_change_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The same words as `llmtrain checkpoints best` has."""
    run = checkpoint_runs.make_run(tmp_path / "run")

    def taken(step: int) -> str:
        checkpoints.act(run.path, "best", None, checkpoints.Options())
        best = capsys.readouterr()
        assert best.out == f"{run.checkpoint(step)}\n"
        assert find_model(run.path) == run.checkpoint(step) / "model"
        assert capsys.readouterr().err == best.err
        return best.err

    for step, loss in ((100, 3.0), (200, 2.9), (300, 3.1)):
        save(run, step, loss)
        (run.checkpoint(step) / "model" / "config.json").write_text("{}")
    assert taken(200) == (
        "note: step 200 is taken; it has the lowest held-out loss that training computed of those on disk; "
        "none has been scored from disk\n"
    )
    score(run, 100, stretches(0.0))
    assert taken(100) == (
        "note: step 100 is taken; this is of the 1 scored so far: 2 later ones wait; step 200's loss was lower at its "
        "save: 2.9000\n"
    )
    score(run, 200, stretches(-0.1))
    score(run, 300, stretches(0.1))
    assert taken(200) == ""
    for step in run.checkpoint_steps():
        shutil.rmtree(run.checkpoint(step))
    save(run, 400, None)
    (run.checkpoint(400) / "model" / "config.json").write_text("{}")
    assert find_model(run.path) == run.checkpoint(400) / "model"
    told = "note: step 400 is taken, the newest: no held-out loss of any checkpoint is known\n"
    assert capsys.readouterr().err == told


def test_ledgers_survive_a_cut_line_and_rewind(tmp_path: Path):
    ledger = tmp_path / "l.jsonl"
    jsonl.append(ledger, [{"step": s} for s in range(5)])
    with ledger.open("a") as file:
        file.write('{"step": 5, "lo')
    assert [r["step"] for r in jsonl.read(ledger)] == [0, 1, 2, 3, 4]
    jsonl.rewind(ledger, 2)
    assert ledger.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n'


def test_rewinding_reads_the_end_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ledger = tmp_path / "l.jsonl"
    jsonl.append(ledger, [{"step": s // 2, "text": "\u00e9" * (s % 7) * 20_000} for s in range(60)])
    whole = ledger.read_text().splitlines(keepends=True)
    with monkeypatch.context() as patch:
        patch.setattr(jsonl, "read", lambda _: pytest.fail("all of it was read"))
        for last in (30, 25, 11, 0, -1):
            jsonl.rewind(ledger, last)
            assert ledger.read_text() == "".join(whole[: 2 * (last + 1)])
        jsonl.rewind(tmp_path / "none.jsonl", 3)
    assert not (tmp_path / "none.jsonl").exists()


def lives(folder: Path) -> None:
    """A run that was started and resumed twice: values are 10 x the start, plus the step."""
    for start, (first, end) in enumerate(((0, 5), (3, 7), (5, 8))):
        board = TensorBoard(folder, first_step=first)
        if not first:
            board.text(0, "configuration", "    <script>alert(1)</script>")
            board.hparams({"optim.lr": 0.1, "model.kind": "gpt", "model.tie_weights": True}, ["heldout/loss"])
        for step in range(first, end):
            board.scalars(step, {"train/loss": 10.0 * start + step})
        board.close()


ONCE_EACH = [(0, 0.0), (1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0), (5, 25.0), (6, 26.0), (7, 27.0)]


def scalars(folder: Path, loader: str) -> list[tuple[int, float]]:
    """As TensorBoard shows them: with its loader in Python, or as programs read them."""
    module = pytest.importorskip(f"tensorboard.backend.event_processing.{loader}")
    sizes = {"scalars": 0, "tensors": 0}
    events = module.EventAccumulator(str(folder), sizes).Reload()
    if loader == "event_accumulator":
        return [(e.step, e.value) for e in events.Scalars("train/loss")]
    return [(e.step, e.tensor_proto.float_val[0]) for e in events.Tensors("train/loss")]


@pytest.mark.parametrize("loader", ["event_accumulator", "plugin_event_accumulator"])
def test_tensorboard_shows_steps_that_were_computed_again_once(tmp_path: Path, loader: str):
    lives(tmp_path)
    assert scalars(tmp_path, loader) == ONCE_EACH


@pytest.mark.parametrize("loader", ["event_accumulator", "plugin_event_accumulator"])
def test_a_clock_that_was_set_back_hides_nothing(tmp_path: Path, loader: str, monkeypatch: pytest.MonkeyPatch):
    """TensorBoard reads files in the order of their names, which begin with the time."""
    backwards = itertools.count(2_000_000_000, -1000)
    monkeypatch.setattr(time, "time", lambda: float(next(backwards)))
    lives(tmp_path)
    assert scalars(tmp_path, loader) == ONCE_EACH


@pytest.mark.parametrize("loader", ["event_accumulator", "plugin_event_accumulator"])
def test_a_run_whose_first_file_names_no_start_is_shown_once_too(tmp_path: Path, loader: str):
    lives(tmp_path)
    first = min(tmp_path.iterdir())
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    records = list(loading.RawEventFileLoader(str(first)).Load())
    kept = [record for record in records if not Event.FromString(record).HasField("session_log")]
    assert len(kept) < len(records)
    first.write_bytes(b"".join(framed(record) for record in kept))
    assert scalars(tmp_path, loader) == ONCE_EACH


def framed(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return b"".join((length, tensorboard._masked_crc(length), data, tensorboard._masked_crc(data)))


def test_a_score_stands_at_the_time_that_it_names(tmp_path: Path):
    """A service that writes it later, or once more, does not move it."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = TensorBoard(tmp_path, first_step=0)
    board.scalars(1, {"score/loss": 3.0}, wall_time=1000.0)
    board.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [event.wall_time for event in events.Scalars("score/loss")] == [1000.0]


def test_tensorboard_reads_back_text_and_settings(tmp_path: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    lives(tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert "configuration/text_summary" in events.Tags()["tensors"]
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_a_gpu_without_readings_of_its_own_ends_no_run(monkeypatch: pytest.MonkeyPatch):
    """As part of one (MIG) has none."""
    pynvml = pytest.importorskip("pynvml")

    def not_supported(handle: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    meter = HardwareMeter(torch.device("cpu"))
    meter._gpu = object()
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", not_supported)
    assert set(meter.read()) == {"hardware/memory_gb"}
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", lambda _: SimpleNamespace(gpu=90))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", lambda _: 400_000)
    shown = meter.read()
    assert (shown["hardware/gpu_utilisation_percent"], shown["hardware/gpu_power_w"]) == (90.0, 400.0)
