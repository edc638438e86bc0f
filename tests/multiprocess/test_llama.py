"""A Llama from scratch through whole runs: ranks (gloo), strategies, saves, packed documents, what others read."""

import numpy as np
import pytest
import torch

from llmtrain import shards
from tests.support.runs import LLAMA, Workplace, make_workplace

SETTINGS = ["train.steps=12", "checkpoint.every_steps=4", "optim.schedule.kind=constant"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    workplace = make_workplace(tmp_path_factory.mktemp("llama"), packing="bestfit", model=LLAMA)
    workplace.train("run.name=r1", *SETTINGS)
    workplace.train("run.name=r2", *SETTINGS, ranks=2)
    workplace.train("run.name=zero2", *SETTINGS, "strategy.kind=zero2", ranks=2)
    workplace.train("run.name=half", *SETTINGS, "train.steps=8", ranks=2)
    return workplace


def losses(workplace: Workplace, name: str) -> list[float]:
    return [record["loss"] for record in workplace.ledger(name)]


@pytest.mark.parametrize("name", ["r2", "zero2"])
def test_ranks_and_strategies_compute_the_same(runs: Workplace, name: str):
    assert losses(runs, name) == pytest.approx(losses(runs, "r1"), abs=1e-4)
    mine, alone = runs.ledger(name, "heldout")[-1], runs.ledger("r1", "heldout")[-1]
    assert mine["loss"] == pytest.approx(alone["loss"], abs=1e-4)
    assert mine["loss"] < runs.ledger(name, "heldout")[0]["loss"]


def test_a_resumed_run_ends_bit_equal(runs: Workplace):
    runs.train("run.name=half", *SETTINGS, ranks=2)
    assert runs.weights("half") == runs.weights("r2")


def test_transformers_finds_the_heldout_loss_of_what_was_saved(runs: Workplace):
    """Each document alone, as the packed rows are to be read."""
    from transformers import AutoModelForCausalLM

    newest = max((runs.run_folder("r1") / "checkpoints").glob("step-*"))
    theirs = AutoModelForCausalLM.from_pretrained(newest / "model")
    heldout = shards.open_folder(runs.folder / "shards").split("heldout")
    total, count = 0.0, 0
    for row in range(heldout.num_rows):
        rows = heldout.rows(np.array([row]))
        start = 0
        for length in rows.doc_lens[0].tolist():
            ids = torch.tensor(rows.tokens[0, start : start + length].astype(int))[None]
            if length > 1:
                with torch.no_grad():
                    total += theirs(ids, labels=ids).loss.item() * (length - 1)
                count += length - 1
            start += length
    assert total / count == pytest.approx(runs.ledger("r1", "heldout")[-1]["loss"], abs=1e-4)
