"""SIGKILL at random moments: nothing is lost, and the end is the same to the last bit."""

import contextlib
import os
import random
import signal
import time

import psutil
import pytest

from tests.support.runs import TIMEOUT_S, Workplace

# A save takes a good part of each step here, so that many of the kills fall into one.
SETTINGS = ["checkpoint.every_steps=2", "train.steps=40"]


def newest_step(workplace: Workplace, name: str) -> int:
    steps = [int(p.name[5:]) for p in (workplace.run_folder(name) / "checkpoints").glob("step-*")]
    return max(steps, default=0)


def writing(workplace: Workplace, name: str) -> set[str]:
    """Half-written checkpoints that a kill left, or that are being written."""
    return {path.name for path in (workplace.run_folder(name) / "checkpoints").glob(".writing-*")}


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it started: torchrun gives its workers sessions of their own."""
    agent = psutil.Process(pid)
    return [*agent.children(recursive=True), agent]


def kill_all(victims: list[psutil.Process]) -> None:
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()


def run_until_killed(
    workplace: Workplace, name: str, settings: list[str], ranks: int, draw: random.Random, always_inside: bool
) -> tuple[bool, bool]:
    """Kill the whole process group some time after it has begun to train; returns (killed, inside a save)."""
    ledger = workplace.run_folder(name) / "metrics.jsonl"
    before = newest_step(workplace, name)
    process = workplace.start(f"run.name={name}", *settings, ranks=ranks)
    deadline = time.monotonic() + TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        if ledger.exists() and ledger.stat().st_size and (newest_step(workplace, name) > before or not before):
            break
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.15))
    victims = family(process.pid) if process.poll() is None else []  # now: to find them takes longer than a save
    if always_inside or draw.random() < 0.5:  # a save of so small a model is over in milliseconds
        while process.poll() is None and not writing(workplace, name):
            pass
    killed = process.poll() is None
    if killed:
        kill_all(victims)
    process.communicate()
    return killed, bool(writing(workplace, name))  # each start removes what the kill before left


def campaign(
    workplace: Workplace, ranks: int, kills: int, seed: int, kind: str = "ddp", always_inside: bool = False
) -> None:
    settings = [*SETTINGS, f"strategy.kind={kind}"]
    reference, name = f"calm-{kind}-{ranks}", f"killed-{kind}-{ranks}-{seed}"
    if not workplace.run_folder(reference).exists():
        workplace.train(f"run.name={reference}", *settings, ranks=ranks)
    draw = random.Random(seed)
    done = [run_until_killed(workplace, name, settings, ranks, draw, always_inside) for _ in range(kills)]
    workplace.train(f"run.name={name}", *settings, ranks=ranks)
    inside = sum(i for _, i in done)
    print(f"{sum(k for k, _ in done)} kills, {inside} of them inside a save")
    assert any(killed for killed, _ in done)
    assert inside or not always_inside
    assert workplace.weights(name) == workplace.weights(reference)
    assert workplace.ledger(name) == workplace.ledger(reference)
    assert workplace.ledger(name, "heldout") == workplace.ledger(reference, "heldout")
    leftovers = [p.name for p in (workplace.run_folder(name) / "checkpoints").iterdir() if p.name.startswith(".")]
    assert not leftovers


@pytest.mark.parametrize("ranks", [1, 4])
def test_three_kills(workplace: Workplace, ranks: int):
    campaign(workplace, ranks, kills=3, seed=ranks)


def test_three_kills_inside_a_save_under_zero2(workplace: Workplace):
    campaign(workplace, ranks=2, kills=3, seed=5, kind="zero2", always_inside=True)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(200, 203))
def test_ten_kills_inside_a_save_under_zero2(workplace: Workplace, seed: int):
    campaign(workplace, ranks=4, kills=10, seed=seed, kind="zero2", always_inside=True)


@pytest.mark.soak
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("seed", range(100, 103))
def test_ten_kills(workplace: Workplace, ranks: int, seed: int):
    campaign(workplace, ranks, kills=10, seed=seed)


def test_two_then_one_then_four_ranks_see_what_one_run_would_have_seen(workplace: Workplace):
    """Across epoch boundaries: the training split has fewer rows than the run takes."""
    length = ["train.epochs=2", "model.dropout=0.0", "checkpoint.every_steps=5", "train.global_batch_size=64"]
    workplace.train("run.name=steady", *length)
    reference = workplace.ledger("steady")
    total = len(reference)
    assert reference[-1]["epoch"] >= 2
    for ranks, steps in ((2, total // 3), (1, total * 3 // 4), (4, total)):
        # The schedule depends on the length, so runs are stopped, not shortened.
        stop_at(workplace, "elastic", steps, total, [*length], ranks)
    mine = workplace.ledger("elastic")
    assert [r["digest"] for r in mine] == [r["digest"] for r in reference]
    for a, b in zip(mine, reference, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def stop_at(workplace: Workplace, name: str, step: int, total: int, settings: list[str], ranks: int) -> None:
    """Train on `ranks` ranks until about `step`, then ask all of them to stop."""
    process = workplace.start(f"run.name={name}", *settings, ranks=ranks)
    ledger = workplace.run_folder(name) / "metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT_S
    while process.poll() is None and step < total and time.monotonic() < deadline:
        if ledger.exists() and f'"step": {step},' in ledger.read_text():
            os.killpg(process.pid, signal.SIGTERM)
            break
        time.sleep(0.01)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert newest_step(workplace, name) >= step, output
