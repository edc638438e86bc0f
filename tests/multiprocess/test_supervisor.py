"""`llmtrain run` on three ranks: whatever becomes of one of them, it comes back and ends as if nothing had been."""

import random
import re
import signal
import statistics
import time
from pathlib import Path

import pytest

from launcher.keeper import hangs
from launcher.keeper.meeting import Meeting
from launcher.keeper.rules import Rules
from launcher.keeper.supervisor import Supervisor
from launcher.keeper.torchrun import Start
from llmtrain import heartbeat
from llmtrain.rundir import RunDir
from tests.support.runs import Workplace, environment
from tests.support.supervised import Fault, Supervised

RANKS = ["--ranks", "3"]
SETTINGS = ["train.global_batch_size=6", "checkpoint.every_steps=5"]
BETWEEN = 15
"""Steps between two kills: a new checkpoint, and some more."""
LENGTH = [*SETTINGS, "train.steps=120"]
HANG_S = 5


@pytest.fixture(scope="module")
def calm(workplace: Workplace) -> str:
    """An undisturbed run."""
    workplace.train("run.name=calm", *LENGTH, ranks=3)
    return "calm"


def ends_as(workplace: Workplace, run: Supervised, calm: str) -> None:
    assert run.end() == 0, run.said
    assert workplace.ledger(run.run.name) == workplace.ledger(calm)  # sample digests and losses, step by step
    assert workplace.weights(run.run.name) == workplace.weights(calm)


def campaign(workplace: Workplace, kills: int, seed: int) -> list[float]:
    """SIGKILL for random ranks at random moments; returns how many seconds each cost until the next new step."""
    draw, reference = random.Random(seed), f"calm-{kills}"
    settings = [*SETTINGS, f"train.steps={BETWEEN * (kills + 5)}"]
    workplace.train(f"run.name={reference}", *settings, ranks=3)
    victims = [*draw.sample(range(3), 3), *(draw.randrange(3) for _ in range(kills - 3))]
    recoveries: list[float] = []
    with Supervised(workplace, f"killed-{seed}", *RANKS, *settings) as run:
        for number, victim in enumerate(victims, start=1):
            run.wait_for_step(BETWEEN * number + draw.randrange(BETWEEN - 5))
            time.sleep(draw.uniform(0, 0.05))
            killed_at = time.time()
            run.rank(victim).kill()
            recoveries.append(run.recovered(number) - killed_at)
            print(f"kill {number}: rank {victim}, {recoveries[-1]:.1f} s")
        ends_as(workplace, run, reference)
    print(f"{kills} kills: median {statistics.median(recoveries):.1f} s, longest {max(recoveries):.1f} s")
    return recoveries


def test_three_kills(workplace: Workplace):
    """Each rank once; rank 0 holds the store that the others meet at, and writes the checkpoints."""
    campaign(workplace, kills=3, seed=3)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_twenty_kills(workplace: Workplace):
    campaign(workplace, kills=20, seed=20)


def hang_found(run: Supervised, since: float, times: int) -> str:
    """Wait until the hang is over; returns what was said of it, after a look at the stacks."""
    pattern = r"llmtrain: (rank .+): the stacks of all ranks are in (.+)$"
    found_at, said = run.wait_for_line(pattern, times)
    again_at, _ = run.wait_for_line("starting again from step", times)
    steps_at = run.recovered(times)
    print(
        f"{said[1]}: found after {found_at - since:.1f} s, started again after {again_at - since:.1f} s "
        f"(limit {HANG_S} s), new steps after {steps_at - since:.1f} s"
    )
    stacks = Path(said[2]).read_text()
    for rank in range(3):
        own = re.search(rf"^rank {rank}, process .*?(?=^rank \d, process|\Z)", stacks, re.MULTILINE | re.DOTALL)
        assert own is not None, stacks
        assert "llmtrain/trainer.py" in own[0], stacks
    return said[1]


def test_hangs(workplace: Workplace, calm: str, tmp_path: Path):
    """A dead-lock in data loading, one inside a forward pass, and SIGSTOP, each in one rank alone."""
    faults = [
        Fault("data stops", rank=2, call=15, struck=tmp_path / "data"),
        Fault("forward stops", rank=0, call=25, struck=tmp_path / "forward"),
    ]
    with Supervised(workplace, "hangs", *RANKS, "--hang-after", str(HANG_S), *LENGTH, faults=faults) as run:
        run.wait_for_line("rank .* the stacks of all ranks", 1)
        said = hang_found(run, faults[0].time, 1)
        assert re.fullmatch(r"rank 2 stands still since \d+ s, at step \d+, taking data", said)
        run.wait_for_line("rank .* the stacks of all ranks", 2)
        said = hang_found(run, faults[1].time, 2)
        assert re.fullmatch(r"rank 0 stands still since \d+ s, at step \d+, computing", said)
        run.wait_for_checkpoint(run.newest_checkpoint())
        stopped_at = time.time()
        run.rank(1).suspend()
        said = hang_found(run, stopped_at, 3)
        assert re.fullmatch(r"rank 1 does not run at all since \d+ s, at step \d+, .*", said)
        ends_as(workplace, run, calm)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(6))
def test_sigstop(workplace: Workplace, calm: str, seed: int):
    draw = random.Random(seed)
    rank = draw.randrange(3)
    with Supervised(workplace, f"stopped-{seed}", *RANKS, "--hang-after", str(HANG_S), *LENGTH) as run:
        run.wait_for_step(draw.randrange(10, 60))  # well before the end, which is near
        stopped_at = time.time()
        run.rank(rank).suspend()
        assert hang_found(run, stopped_at, 1).startswith(f"rank {rank} does not run at all")
        ends_as(workplace, run, calm)


@pytest.mark.soak
def test_a_rank_that_keeps_pythons_lock(workplace: Workplace, calm: str, tmp_path: Path):
    """In foreign code, as a driver may that waits for its device: no thread of that rank runs any more."""
    fault = Fault("forward freezes", rank=1, call=25, struck=tmp_path / "struck")
    with Supervised(workplace, "frozen", *RANKS, "--hang-after", str(HANG_S), *LENGTH, faults=[fault]) as run:
        run.wait_for_line("rank .* the stacks of all ranks", 1)
        said = hang_found(run, fault.time, 1)
        # What it did at its last sign of life, up to a second before.
        doing = "|".join(map(re.escape, [*hangs._WORDS.values(), *heartbeat.PHASES]))
        assert re.fullmatch(rf"rank 1 does not run at all since \d+ s, at step \d+, ({doing})", said)
        ends_as(workplace, run, calm)


def test_crashes(workplace: Workplace, calm: str, tmp_path: Path):
    """An exception in data loading, and a segmentation fault, each in one rank alone."""
    faults = [
        Fault("data fails", rank=1, call=15, struck=tmp_path / "data"),
        Fault("forward crashes", rank=2, call=25, struck=tmp_path / "forward"),
    ]
    # A save beside training could still be under way when the rank falls: then it begins again from the one before.
    settings = [*LENGTH, "checkpoint.background=false"]
    with Supervised(workplace, "crashes", *RANKS, *settings, faults=faults) as run:
        ends_as(workplace, run, calm)
    assert "rank 1 failed: RuntimeError: a bad row; starting again from step 10" in run.said
    assert "rank 2 crashed: Fatal Python error: Segmentation fault; starting again from step" in run.said
    shown = run.said.split("ranks/rank-2.log:\n")[1].split("starting again")[0]
    assert re.search(r"Fatal Python error.*in crash.*in patched", shown, re.DOTALL), shown
    kinds = [event["message"] for event in workplace.ledger("crashes", "events") if event["kind"] == "restarted"]
    assert kinds == ["rank 1 failed: RuntimeError: a bad row", "rank 2 crashed: Fatal Python error: Segmentation fault"]


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.soak)])
@pytest.mark.soak
def test_a_rank_killed_before_training_begins(workplace: Workplace, calm: str, rank: int):
    """While the others wait for it, or it holds what they wait for."""
    with Supervised(workplace, f"early-{rank}", *RANKS, *LENGTH) as run:
        run.wait_for_rank(rank)
        run.rank(rank).kill()
        run.wait_for_line("starting again from step 0")
        ends_as(workplace, run, calm)


def test_the_time_limit(workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The run saves before it, and goes on from there."""
    monkeypatch.chdir(workplace.folder)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    run = RunDir(workplace.run_folder("limited"))
    words = [str(workplace.config), "run.name=limited", *LENGTH, "train.steps=1000000", "checkpoint.every_steps=100000"]
    rules = Rules(ends_at=time.time() + 60, lead_s=30)
    supervisor = Supervisor(Start(words, 3), run, rules, Meeting(tmp_path), tmp_path / "ranks", tmp_path / "stop")
    code = supervisor.supervise()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert (code, supervisor.stopper.reason) == (75, "time limit")
    assert time.time() < rules.ends_at
    (step,) = run.checkpoint_steps()
    assert workplace.ledger("limited")[-1]["step"] == step


def test_a_gpu_too_small_for_a_step_is_said_and_not_tried_again(workplace: Workplace, tmp_path: Path):
    """Also where it meets another rank than the one that writes to the terminal."""
    fault = Fault("forward exhausts", rank=1, call=1, struck=tmp_path / "struck")
    with Supervised(workplace, "too-small", "--ranks", "2", *SETTINGS, "train.steps=4", faults=[fault]) as run:
        assert run.end() == 24, run.said
    assert "starting again" not in run.said
    assert (
        "error: rank 1, before its first step was done: CUDA out of memory. Tried to allocate 2.00 GiB.\n" in run.said
    )
    assert "Less memory is taken with train.micro_batch_size=1 (now 3; the global batch stays), train.acti" in run.said


def test_a_gpu_that_was_large_enough_for_a_step_is_tried_again(workplace: Workplace, tmp_path: Path):
    fault = Fault("forward exhausts", rank=1, call=5, struck=tmp_path / "struck")
    with Supervised(workplace, "was-large", "--ranks", "2", *SETTINGS, "train.steps=6", faults=[fault]) as run:
        assert run.end() == 0, run.said
    assert "rank 1 failed: OutOfMemoryError: CUDA out of memory" in run.said
    assert "Less memory is taken with train.micro_batch_size=1" in run.said
