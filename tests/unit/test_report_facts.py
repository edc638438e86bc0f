"""What a report reads of a run: of a million steps in seconds, and nothing otherwise than record by record."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader

from launcher.report import speed
from launcher.report.facts import read_facts
from launcher.watching.queue_view import read_queue
from llmtrain import jsonl
from llmtrain.errors import RunFolderError
from llmtrain.rundir import RunDir
from llmtrain.tensorboard import TensorBoard
from tests.support import checkpoint_runs


def records(count: int) -> list[dict[str, Any]]:
    """As training writes them; some steps twice, some without a gradient norm."""
    own = random.Random(0)
    made = [
        {
            "step": step if own.random() < 0.9 else own.randint(1, step),
            "epoch": step / 7,
            "loss": 10 ** own.uniform(-20, 5),
            "grad_norm": own.random(),
            "lr": own.choice([0, 1e-4 / 3]),
            "targets": step * 2**30,
            "samples": step,
            "digest": f"{step:016x}",
        }
        for step in range(1, count + 1)
    ]
    return [record if own.random() < 0.9 else {**record, "grad_norm": None} for record in made]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return checkpoint_runs.make_run(tmp_path / "run")


@pytest.mark.parametrize("not_finite", [None, math.nan, math.inf])
def test_steps_are_read_as_they_were_written(run: RunDir, not_finite: float | None):
    written = records(2000)
    if not_finite is not None:
        written += [{**written[-1], "step": 3001 + n, key: not_finite} for n, key in enumerate(("grad_norm", "loss"))]
    jsonl.append(run.metrics, written)
    with run.metrics.open("a") as file:
        file.write('{"step": 9999, "lo')  # cut short by a crash
    found = read_facts(run, read_queue([run]))
    last = {record["step"]: record for record in written}
    for key in ("loss", "lr", "grad_norm"):
        wanted = {s: r[key] for s, r in sorted(last.items()) if r[key] is not None and math.isfinite(r[key])}
        assert found.metrics[key].steps.tolist() == list(wanted)
        assert found.metrics[key].values.tolist() == list(wanted.values())
    assert found.clock.steps.tolist() == [0, *sorted(last)]
    assert found.clock.epochs.tolist() == [0, *(last[step]["epoch"] for step in sorted(last))]
    assert found.clock.tokens.tolist() == [0, *(last[step]["targets"] for step in sorted(last))]
    assert found.not_finite == (None if not_finite is None else 3001)


def test_pythons_json_is_not_asked_where_nothing_is_damaged(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    """It takes eight seconds for a million steps; TensorBoard's reader of event files twenty."""
    jsonl.append(run.metrics, records(10))
    board = TensorBoard(run.tensorboard, first_step=0)
    board.scalars(1, {"speed/tokens_per_s": 5.0})
    board.close()
    real = jsonl.read

    def read(path: Path) -> list[dict[str, Any]]:
        assert path != run.metrics
        return real(path)

    monkeypatch.setattr(jsonl, "read", read)
    monkeypatch.setattr(RawEventFileLoader, "__init__", None)
    found = read_facts(run, read_queue([run]))
    assert len(found.clock.steps) > 1
    assert found.speed.tokens_per_s == {1: 5.0}


def test_a_damaged_line_is_named(run: RunDir):
    jsonl.append(run.metrics, records(3))
    lines = run.metrics.read_text().splitlines()
    run.metrics.write_text("\n".join([lines[0], lines[1][:-20], lines[2], ""]))
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl: line 2 is damaged"):
        read_facts(run, read_queue([run]))


@pytest.mark.parametrize("at", [0, 5, 9, 20, -30, -3])
@pytest.mark.parametrize("cut", [False, True])
def test_an_event_file_is_read_as_far_as_tensorboard_reads_it(tmp_path: Path, at: int, cut: bool):
    board = TensorBoard(tmp_path, first_step=0)
    for step in range(5):
        board.scalars(step, {"speed/tokens_per_s": 1.0 + step})
    board.close()
    (path,) = tmp_path.iterdir()
    assert list(speed._records(path)) == list(RawEventFileLoader(str(path)).Load())
    content = bytearray(path.read_bytes())
    content[at] ^= 64
    path.write_bytes(content[:at] if cut else content)
    assert list(speed._records(path)) == list(RawEventFileLoader(str(path)).Load())
