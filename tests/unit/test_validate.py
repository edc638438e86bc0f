"""How a checkpoint is scored, so that all scores of a run can be compared."""

from pathlib import Path

import numpy as np
import pytest

from llmtrain import choose, ledger
from llmtrain.rundir import RunDir
from llmtrain.service import validate
from tests.support.checkpoint_runs import make_run, save, score, stretches


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = make_run(tmp_path / "run")
    for step in (100, 200, 300):
        save(made, step)
    return made


def test_no_more_stretches_are_recorded_than_are_compared(run: RunDir):
    assert validate.most_stretches(run, "heldout") == choose.MAX_UNITS
    all_of_it = stretches(0.0, count=3 * choose.MAX_UNITS + 5), stretches(0.1, 3 * choose.MAX_UNITS + 5, noise=0.03)
    found: list[tuple[float, float]] = []
    for most in (1 << 16, choose.MAX_UNITS):
        best, other = (choose.merged(losses, most) for losses in all_of_it)
        assert best.shape[1] <= most
        (interval,) = choose.differences(run, score(run, 100, best), [score(run, 200, other)])
        assert interval is not None
        found.append(interval)
    assert found[1] == pytest.approx(found[0])


def test_a_run_with_more_of_them_goes_on_as_it_began(run: RunDir):
    score(run, 100, stretches(0.0, count=200), split="test")
    score(run, 100, stretches(0.0, count=choose.MAX_UNITS + 1))
    most = validate.most_stretches(run, "heldout")
    assert validate.most_stretches(run, "test") == choose.MAX_UNITS
    old = choose.read_losses(run, ledger.scores(run)[100])
    assert old is not None
    assert np.array_equal(choose.merged(old, most), old)


def test_the_first_score_says_in_which_precision_the_others_are_computed(run: RunDir):
    assert validate.recorded_precision(run) is None
    first = score(run, 300, 3.0).model_copy(update={"how": "the training ranks"})
    ledger.append(run.scores, first)
    assert validate.recorded_precision(run) is None
    for step, how in ((200, "cuda:1 bf16"), (100, "cpu fp32")):
        ledger.append(run.scores, first.model_copy(update={"step": step, "how": how}))
    assert validate.recorded_precision(run) == "bf16"
