"""Gradients are summed over the ranks: exactly, the same on all, and while the backward pass goes on."""

import subprocess
from pathlib import Path

import pytest

from tests.support.runs import TIMEOUT_S, environment, torchrun

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("ranks", [2, 3])
def test_gradients_are_the_sums_over_the_ranks(ranks: int):
    done = subprocess.run(
        [*torchrun(ranks), "-m", "tests.support.bucket_probe"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[:4000]
