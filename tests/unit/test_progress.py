"""What the person at the terminal is shown while a run goes on."""

import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from llmtrain import assemble, log, progress
from llmtrain.batches import BatchPlan
from llmtrain.config import load_config
from llmtrain.manifest import TrainState
from llmtrain.metrics import Meter
from llmtrain.progress import Progress, Reading, fitted
from llmtrain.rundir import RunDir
from llmtrain.world import World
from tests.support.runs import environment

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(progress, "_PLAIN_EVERY_S", 0.0)
    monkeypatch.setattr(log, "info", said.append)
    monkeypatch.setattr(log, "warning", said.append)
    return said


def make_meter(run: RunDir, shown: Progress, total_steps: int) -> Meter:
    run.create()
    return Meter(run, ALONE, None, shown, BatchPlan(8, 8, 1, total_steps), 100, 8.0, 1.0, bf16=False)


def take_step(meter: Meter, step: int) -> None:
    state = TrainState(step=step, samples=8 * step, targets=64 * step)
    meter.observe(state, 64, 0, 1e-3, torch.tensor(64.0), torch.tensor(1.0))


def test_a_held_out_loss_of_an_earlier_step_names_that_step(tmp_path: Path, lines: list[str]):
    meter = make_meter(RunDir(tmp_path / "run"), Progress(3, 0), 3)
    for step in (1, 2, 3):
        take_step(meter, step)
        meter.flush(0.0, at_once=True)
        if step < 3:
            meter.heldout(TrainState(step=step), {"loss": 4.0 + step})
    assert [line.partition("loss 1.0000")[2].partition("  8")[0].split("  ")[1] for line in lines][1:] == [
        "held-out 5.0000 (step 1)",
        "held-out 6.0000 (step 2)",
    ]
    assert "held-out" not in lines[0]


def test_the_live_line_names_it_from_the_next_step_on():
    shown, told = Progress(9, 0, enabled=False), list[str]()
    shown._enabled, shown._live = True, True

    def look() -> None:
        told.append(fitted(shown._step, 9, shown._last, 200)[2])

    shown.show(Reading(4, 9, 1.0, (2, 5.0), 8.0, 60.0))
    look()
    shown.show_heldout(4, 3.5)
    look()
    shown.show(Reading(5, 9, 1.0, (4, 3.5), 8.0, 60.0))
    look()
    assert [line.partition("held-out ")[2].partition("  ")[0] for line in told] == [
        "5.0000 (step 2)",
        "3.5000",
        "3.5000 (step 4)",
    ]


AT_A_TERMINAL = """
from llmtrain.progress import Progress, Reading, fitted
shown = Progress(20000, 0)
shown.show(Reading(13450, 20000, 3.1, (13000, 3.4), 123456, 34567))
shown.close()
"""


@pytest.mark.parametrize(
    ("columns", "figures"),
    [
        (20, ""),
        (40, "loss 3.1000"),
        (60, "loss 3.1000  held-out 3.4000  9:36:07 left"),
        (80, "loss 3.1000  held-out 3.4000  123,456 tokens/s  9:36:07 left"),
        (100, "loss 3.1000  held-out 3.4000 (step 13000)  123,456 tokens/s  9:36:07 left"),
        (120, "loss 3.1000  held-out 3.4000 (step 13000)  123,456 tokens/s  9:36:07 left"),
    ],
)
def test_a_terminal_of_any_width_shows_whole_numbers(columns: int, figures: str):
    """In a pseudo-terminal: which step of how many, always; the bar goes before any figure does."""
    code = (
        "import fcntl, os, pty, struct, sys, termios\n"
        "pid, fd = pty.fork()\n"
        "if pid == 0:\n"
        f"    fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack('HHHH', 24, {columns}, 0, 0))\n"
        f"    exec({AT_A_TERMINAL!r})\n"
        "    os._exit(0)\n"
        "while True:\n"
        "    try: piece = os.read(fd, 65536)\n"
        "    except OSError: break\n"
        "    if not piece: break\n"
        "    sys.stdout.buffer.write(piece)\n"
    )
    surroundings = {name: value for name, value in environment().items() if name not in ("COLUMNS", "LINES")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**surroundings, "TERM": "xterm"}, capture_output=True, text=True, check=True
    )
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", done.stdout)
    line = [line for line in re.split(r"[\r\n]+", plain) if line.strip()][-1].rstrip()
    assert len(line) <= columns
    assert re.sub(r"  [^ a-z0-9]{8,24}  ", "  ", line) == f"step 13450/20000  {figures}".rstrip()
    assert (re.search("[^ -~]", line) is not None) is (columns == 120)  # the bar


def test_the_time_left_counts_what_goes_on_between_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of a run that was resumed at step 10: steps take a second, the evaluation after each two takes 8."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    shown: list[Reading] = []
    meter = make_meter(RunDir(tmp_path / "run"), cast(Any, SimpleNamespace(show=shown.append)), 110)
    clock[0] += 1000  # evaluated before the first step, which happens once
    meter.restart_clock()
    for step in range(11, 31):
        take_step(meter, step)
        clock[0] += 1
        if step % 2 == 0:
            meter.flush(0.0, at_once=True)
            clock[0] += 8
            meter.restart_clock()
    assert shown[-1].step == 30
    assert shown[-1].tokens_per_s == 8 * 8.0
    assert shown[-1].seconds_left == pytest.approx(80 * (20 + 9 * 8) / 20)


@pytest.mark.parametrize(("total", "begun", "warned"), [(30, 0, True), (50, 0, False), (30, 30, False)])
def test_a_start_warns_of_a_warmup_that_is_longer_than_the_run(lines: list[str], total: int, begun: int, warned: bool):
    config, _ = load_config(None, [f"train.steps={total}"])
    data: Any = SimpleNamespace(
        manifest=SimpleNamespace(splits={"train": SimpleNamespace(rows=100, tokens=1000)}), path="x", fingerprint="f"
    )
    model: Any = SimpleNamespace(title=lambda: "GPT")
    assemble.announce(config, ALONE, data, BatchPlan(8, 8, 1, total), model, TrainState(step=begun))
    said = [line for line in lines if line.startswith("warm-up ")]
    assert len(said) == warned
    assert all("50 of 30 steps: the learning rate ends at 0.0012 and never reaches optim.lr=0.002" in s for s in said)
