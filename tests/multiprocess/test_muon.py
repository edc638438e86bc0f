"""Muon on several ranks (gloo): each updates its share of the matrices, all have the same weights."""

import shutil

import pytest

from tests.support.runs import Workplace, make_workplace

SETTINGS = ["optim.kind=muon", "optim.schedule.kind=constant", "model.dropout=0.0", "checkpoint.every_steps=8"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    workplace = make_workplace(tmp_path_factory.mktemp("muon"))
    for ranks in (1, 2, 3):
        workplace.train(f"run.name=r{ranks}", "train.steps=16", "train.global_batch_size=6", *SETTINGS, ranks=ranks)
    return workplace


def losses(workplace: Workplace, name: str) -> list[float]:
    return [record["loss"] for record in workplace.ledger(name)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_losses_are_those_of_one_rank(runs: Workplace, ranks: int):
    """Newton-Schulz works in bf16, where a sum in another order can round a number to its neighbour."""
    assert losses(runs, f"r{ranks}") == pytest.approx(losses(runs, "r1"), abs=5e-3)


def test_it_learns_faster_than_adamw(runs: Workplace):
    runs.train("run.name=adamw", "train.steps=16", "train.global_batch_size=6", *SETTINGS, "optim.kind=adamw")
    assert losses(runs, "r1")[-1] < losses(runs, "adamw")[-1]


@pytest.mark.parametrize(("before", "after"), [(2, 2), (3, 3), (1, 3), (3, 2)])
def test_a_resumed_run_goes_on_where_it_was(runs: Workplace, before: int, after: int):
    name = f"from{before}-to{after}"
    copied = shutil.copytree(runs.run_folder(f"r{before}"), runs.run_folder(name))
    shutil.rmtree(copied / "checkpoints" / "step-00000016")
    runs.train(f"run.name={name}", "train.steps=16", "train.global_batch_size=6", *SETTINGS, ranks=after)
    if before == after:
        assert runs.weights(name) == runs.weights(f"r{after}")
    else:
        assert losses(runs, name)[8:] == pytest.approx(losses(runs, f"r{after}")[8:], abs=5e-3)
