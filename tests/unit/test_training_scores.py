"""Scores that training measured, where what it noted beside them is lost: unknown is not zero."""

import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llmtrain import ledger
from llmtrain.ledger import Status
from llmtrain.rundir import RunDir
from llmtrain.service import card, plan
from llmtrain.service.board import Board
from llmtrain.service.queue import Inspector
from llmtrain.service.scoring import Scoring
from tests.support.checkpoint_runs import config_of, make_run, save, score, upload

HERE = "ada/gpt"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """One checkpoint that was scored by its manifest alone."""
    made = make_run(tmp_path / "run", f"hub.repo={HERE}", "service.score=training")
    save(made, 100, 3.25)
    made.heldout.unlink()
    config = config_of(made)
    Scoring(made, lock=0).advance(config, Inspector(made).look(config, scoring=False), "training")
    upload(made, 100)
    return made


def test_the_perplexity_follows_from_the_loss_and_the_rest_is_unknown(run: RunDir):
    score = ledger.scores(run)[100]
    assert score.perplexity == pytest.approx(math.exp(3.25))
    assert math.isnan(score.bits_per_byte)


def test_the_card_leaves_it_out(run: RunDir):
    shown = plan.to_show(run, HERE)
    assert shown is not None
    text = card.render(HERE, config_of(run), run, shown)
    assert "| 3.2500 | 25.79 |  |" in text
    results = card.metadata(config_of(run), run, shown.upload).eval_results
    assert results is not None
    assert [result.metric_type for result in results] == ["loss", "perplexity"]


def test_the_board_says_of_the_newest_alone_what_is_waiting_now(run: RunDir):
    """Rewritten after a restart, older ones would have today's figures."""
    for step in (120, 130):
        save(run, step)
        score(run, step, 3.0)
    board = Board(run)
    board.show(ledger.scores(run), Status(pid=1, host="here"))
    board.close()
    events = EventAccumulator(str(run.validation_board)).Reload()
    assert len(events.Scalars("heldout/loss")) > 1
    assert [event.step for event in events.Scalars("service/uploaded")] == [130]


def test_the_board_leaves_it_out(run: RunDir):
    board = Board(run)
    board.show(ledger.scores(run), Status(pid=1, host="here"))
    board.close()
    tags = EventAccumulator(str(run.validation_board)).Reload().Tags()["scalars"]
    assert "heldout/perplexity" in tags
    assert "heldout/bits_per_byte" not in tags
