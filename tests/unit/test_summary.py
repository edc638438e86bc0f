"""What a run is said to have come to, and what TensorBoard is given."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmtrain import rundir, summary
from llmtrain.hardware import HardwareMeter
from llmtrain.rundir import RunDir
from llmtrain.tensorboard import TensorBoard


def make_run(tmp_path: Path, heldout: list[float]) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    for i, loss in enumerate(heldout):
        rundir.append_jsonl(run.heldout, [{"step": 10 * i, "epoch": i / 2, "loss": loss, "train_loss": 5.0 - i}])
        if i:
            run.checkpoint(10 * i).mkdir()
            record = {"step": 10 * i, "epoch": i / 2, "loss": 5.0 - i, "targets": 100 * i}
            rundir.append_jsonl(run.metrics, [record])
    return run


def test_overfitting_is_named_with_its_beginning(tmp_path: Path):
    run = make_run(tmp_path, [9.0, 7.0, 6.0, 6.2, 6.5])
    found = summary.write(run)
    assert found is not None
    assert (found.overfits, found.lowest_step, found.first_heldout, found.last_heldout) == (True, 20, 9.0, 6.5)
    text = summary.describe(run, found)
    assert "began at step 20 (epoch 1.00): since then the held-out loss rose by 8.3%" in text
    assert f"best checkpoint {run.checkpoint(20)} (held-out loss 6.0000, scored at the save)" in text
    assert "tensorboard --logdir" in text
    assert json.loads(run.summary.read_text())["best_checkpoint"] == str(run.checkpoint(20))
    assert run.curve.read_bytes().startswith(b"\x89PNG")


def test_no_overfitting_where_there_is_none(tmp_path: Path):
    run = make_run(tmp_path, [9.0, 7.0, 6.0, 6.01])
    found = summary.summarise(run)
    assert found is not None
    assert not found.overfits
    assert "none seen" in summary.describe(run, found)


def test_the_best_checkpoint_is_one_that_still_exists(tmp_path: Path):
    run = make_run(tmp_path, [9.0, 6.0, 7.0, 8.0])
    run.checkpoint(10).rmdir()
    found = summary.summarise(run)
    assert found is not None
    assert found.lowest_step == 10
    assert found.best_checkpoint == str(run.checkpoint(20))


def test_ledgers_survive_a_cut_line_and_rewind(tmp_path: Path):
    ledger = tmp_path / "l.jsonl"
    rundir.append_jsonl(ledger, [{"step": s} for s in range(5)])
    with ledger.open("a") as file:
        file.write('{"step": 5, "lo')
    assert [r["step"] for r in rundir.read_jsonl(ledger)] == [0, 1, 2, 3, 4]
    rundir.rewind_jsonl(ledger, 2)
    assert ledger.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n'


def test_tensorboard_reads_back_what_was_written(tmp_path: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = TensorBoard(tmp_path, first_step=0)
    board.text(0, "configuration", "    <script>alert(1)</script>")
    board.hparams({"optim.lr": 0.1, "model.kind": "gpt", "model.tie_weights": True}, ["heldout/loss"])
    for step in range(5):
        board.scalars(step, {"train/loss": 5.0 - step})
    board.close()
    resumed = TensorBoard(tmp_path, first_step=3)  # steps 3 and 4 are computed again
    resumed.scalars(3, {"train/loss": 1.5})
    resumed.close()
    events = accumulator.EventAccumulator(str(tmp_path), {"scalars": 0, "tensors": 0}).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(0, 5.0), (1, 4.0), (2, 3.0), (3, 1.5)]
    assert "configuration/text_summary" in events.Tags()["tensors"]
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_a_gpu_without_readings_of_its_own_ends_no_run():
    """As part of one (MIG) has none."""
    pynvml = pytest.importorskip("pynvml")

    def not_supported(handle: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    meter = HardwareMeter(torch.device("cpu"))
    meter._nvml = SimpleNamespace(NVMLError=pynvml.NVMLError, nvmlDeviceGetUtilizationRates=not_supported)
    assert set(meter.read()) == {"hardware/memory_gb"}
