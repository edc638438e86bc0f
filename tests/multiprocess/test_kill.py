"""SIGKILL at random moments: nothing is lost, and the end is the same to the last bit."""

import os
import random
import signal
import time

import pytest

from tests.support.runs import TIMEOUT_S, Workplace

# A save takes a good part of each step here, so that many of the kills fall into one.
SETTINGS = ["checkpoint.every_steps=2", "train.steps=40"]


def newest_step(workplace: Workplace, name: str) -> int:
    steps = [int(p.name[5:]) for p in (workplace.run_folder(name) / "checkpoints").glob("step-*")]
    return max(steps, default=0)


def run_until_killed(workplace: Workplace, name: str, ranks: int, draw: random.Random) -> tuple[bool, bool]:
    """Kill the whole process group some time after it has begun to train; returns (killed, inside a save)."""
    ledger = workplace.run_folder(name) / "metrics.jsonl"
    before = newest_step(workplace, name)
    process = workplace.start(f"run.name={name}", *SETTINGS, ranks=ranks)
    deadline = time.monotonic() + TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        if ledger.exists() and ledger.stat().st_size and (newest_step(workplace, name) > before or not before):
            break
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.15))
    if draw.random() < 0.5:  # half of them inside a save: a save of so small a model is over in milliseconds
        while process.poll() is None and not any((workplace.run_folder(name) / "checkpoints").glob(".writing-*")):
            pass
    killed = process.poll() is None
    if killed:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    inside = any((workplace.run_folder(name) / "checkpoints").glob(".*"))
    return killed, inside


def campaign(workplace: Workplace, ranks: int, kills: int, seed: int) -> None:
    reference, name = f"calm-{ranks}", f"killed-{ranks}-{seed}"
    if not workplace.run_folder(reference).exists():
        workplace.train(f"run.name={reference}", *SETTINGS, ranks=ranks)
    draw = random.Random(seed)
    done = [run_until_killed(workplace, name, ranks, draw) for _ in range(kills)]
    workplace.train(f"run.name={name}", *SETTINGS, ranks=ranks)
    print(f"{sum(k for k, _ in done)} kills, {sum(i for _, i in done)} of them inside a save")
    assert any(killed for killed, _ in done)
    assert workplace.weights(name) == workplace.weights(reference)
    assert workplace.ledger(name) == workplace.ledger(reference)
    assert workplace.ledger(name, "heldout") == workplace.ledger(reference, "heldout")
    leftovers = [p.name for p in (workplace.run_folder(name) / "checkpoints").iterdir() if p.name.startswith(".")]
    assert not leftovers


@pytest.mark.parametrize("ranks", [1, 4])
def test_three_kills(workplace: Workplace, ranks: int):
    campaign(workplace, ranks, kills=3, seed=ranks)


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
