"""`llmtrain run` on three ranks: whatever becomes of one of them, the run comes back, and ends as if nothing had been."""

import random
import signal
import statistics
import time
from pathlib import Path

import pytest

from tests.support.runs import Workplace
from tests.support.supervised import Fault, Supervised

RANKS = ["--ranks", "3"]
SETTINGS = ["train.global_batch_size=6", "checkpoint.every_steps=5"]
BETWEEN = 15
"""Steps between two kills: a new checkpoint, and some more."""


def campaign(workplace: Workplace, kills: int, seed: int) -> list[float]:
    """SIGKILL for a random rank at random moments; returns how many seconds each cost until the next new step."""
    draw, name = random.Random(seed), f"killed-{kills}-{seed}"
    settings = [*SETTINGS, f"train.steps={BETWEEN * (kills + 2)}"]
    workplace.train(f"run.name=calm-{kills}", *settings, ranks=3)
    recoveries: list[float] = []
    with Supervised(workplace, name, *RANKS, *settings) as run:
        for number in range(1, kills + 1):
            run.wait_for_step(BETWEEN * number + draw.randrange(BETWEEN - 5))
            time.sleep(draw.uniform(0, 0.05))
            victim, killed_at = draw.randrange(3), time.time()
            run.rank(victim).kill()
            recoveries.append(run.recovered(number) - killed_at)
            print(f"kill {number}: rank {victim}, {recoveries[-1]:.1f} s")
        assert run.end() == 0, run.said
    assert workplace.weights(name) == workplace.weights(f"calm-{kills}")
    assert workplace.ledger(name) == workplace.ledger(f"calm-{kills}")
    return recoveries


def test_three_kills(workplace: Workplace):
    campaign(workplace, kills=3, seed=3)
