"""Which checkpoint is proposed, and what is said of the others (the intervals: test_intervals.py)."""

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain import choose, early_stop, intervals, jsonl, ledger, manifest, overfitting, ranking
from llmtrain.ledger import Score
from llmtrain.ranking import Entry, Ranking
from llmtrain.rundir import RunDir
from tests.support.checkpoint_runs import make_run, save, score, stretches, upload


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run")


def saved_and_scored(run: RunDir, shifts: dict[int, float], noise: float = 0.03, count: int = 200) -> None:
    for step, shift in shifts.items():
        save(run, step)
        score(run, step, stretches(shift, count, noise, seed=step))


def ranked(run: RunDir) -> Ranking:
    found = ranking.rank(run)
    assert found is not None
    return found


def record(step: int, loss: float, checkpoint: str = "x") -> Score:
    return Score(
        step=step, checkpoint=checkpoint, loss=loss, perplexity=1, bits_per_byte=1, targets=1, epoch=step / 100,
        origin="disk",
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- the proposal


def test_it_is_paired_so_hard_text_does_not_hide_a_difference(run: RunDir):
    """The stretches' losses spread by 0.3; the difference is 0.005 with a spread of 0.01."""
    saved_and_scored(run, {10: 0.005, 20: 0.0}, noise=0.01)
    assert ranked(run).proposed.step == 20
    assert not ranked(run).entries[0].is_tie


def test_of_those_that_cannot_be_told_apart_the_first_is_proposed(run: RunDir):
    saved_and_scored(run, {100: 0.5, 200: 0.001, 300: 0.0, 400: 0.002, 500: 0.2})
    found = ranked(run)
    best = min(found.entries, key=lambda entry: entry.score.loss)
    assert found.best is best
    assert best.difference is None
    assert [e.step for e in found.entries if e.is_tie or e.is_best] == [200, 300, 400]
    assert found.proposed.step == 200
    low, high = found.entries[0].difference or (0, 0)
    assert 0.4 < low < high < 0.6


def test_a_clear_winner_is_proposed(run: RunDir):
    saved_and_scored(run, {100: 0.5, 200: 0.1, 300: 0.0, 400: 0.1})
    assert ranked(run).proposed.step == 300


def test_equal_losses_propose_the_first(run: RunDir):
    saved_and_scored(run, {100: 0.0, 200: 0.0}, noise=0)
    assert (ranked(run).best.step, ranked(run).proposed.step) == (100, 100)


def test_a_deleted_checkpoint_is_not_proposed_unless_it_is_on_the_hub(run: RunDir):
    saved_and_scored(run, {100: 0.001, 200: 0.0, 300: 0.002, 400: 0.3})
    shutil.rmtree(run.checkpoint(100))
    assert ranked(run).proposed.step == 200
    shutil.rmtree(run.checkpoint(200))
    assert ranked(run).proposed.step == 300
    assert ranked(run).best.step == 200  # a fact about the run, though it is gone
    upload(run, 100)
    assert ranked(run).proposed.step == 300  # as good, and at hand
    shutil.rmtree(run.checkpoint(300))
    assert ranked(run).proposed.step == 100
    upload(run, 100, removed=True)
    assert ranked(run).proposed.step == 400  # not a tie, but the best of what is left
    shutil.rmtree(run.checkpoint(400))
    assert ranked(run).proposed.step == ranked(run).best.step == 200


def test_a_step_that_was_saved_again_waits_for_its_own_score(run: RunDir):
    saved_and_scored(run, {100: 0.0, 200: 0.2})
    save(run, 100, content="other weights")
    assert [entry.step for entry in ranked(run).entries] == [200]
    score(run, 100, stretches(0.4))
    assert [entry.step for entry in ranked(run).entries] == [100, 200]
    assert ranked(run).best.step == 200


def test_a_checkpoint_whose_manifest_cannot_be_read_is_not_proposed(run: RunDir):
    saved_and_scored(run, {100: 0.0, 200: 0.2})
    (run.checkpoint(100) / "manifest.json").write_text("{}")
    assert ranked(run).proposed.step == 200
    assert list(manifest.identities(run)) == [200]


def test_too_few_stretches_give_no_interval_and_no_tie(run: RunDir):
    saved_and_scored(run, {100: 0.001, 200: 0.0}, count=intervals.MIN_UNITS - 1)
    assert [e.difference for e in ranked(run).entries] == [None, None]
    assert ranked(run).proposed.step == ranked(run).best.step
    saved_and_scored(run, {300: -0.999, 400: -1.0}, count=intervals.MIN_UNITS)
    assert sum(e.difference is not None for e in ranked(run).entries) == 1  # the older two are of another text


def test_losses_on_another_text_are_not_compared(run: RunDir):
    saved_and_scored(run, {100: 0.1, 200: 0.0})
    other = stretches(0.1)
    other[1, 3] += 1  # one token more is supervised
    save(run, 150)
    score(run, 150, other)
    assert [e.difference is None for e in ranked(run).entries] == [False, True, True]


def test_between_two_precisions_nothing_is_sure(run: RunDir):
    """bf16 shifts the loss of every stretch alike: paired, the smallest shift would be a sure difference."""
    saved_and_scored(run, {100: 0.0, 200: 0.0, 300: 0.0}, noise=0)
    for step, shift, how in ((200, 0.002, "cuda:1 bf16"), (300, 0.002, "cuda:1 fp32")):
        ledger.append(run.scores, score(run, step, stretches(shift)).model_copy(update={"how": how}))
    first, other, same = ranked(run).entries
    assert first.is_best
    assert (other.difference, other.is_tie) == (None, False)
    assert same.difference == pytest.approx((0.002, 0.002))
    assert ranked(run).reason() == "the lowest held-out loss"
    assert not overfitting.judge(Ranking([first, other])).began


def test_training_s_own_losses_have_no_interval(run: RunDir):
    saved_and_scored(run, {100: 0.1, 200: 0.0})
    save(run, 300)
    score(run, 300, 2.0)
    assert ranked(run).best.step == 300
    assert [e.difference for e in ranked(run).entries] == [None, None, None]


def test_what_training_measured_stands_beside_the_score(run: RunDir):
    save(run, 100, loss=3.0)
    score(run, 100, stretches(0.0))
    assert ranked(run).entries[0].train_loss == pytest.approx(2.9)


def test_nothing_scored_is_no_ranking(run: RunDir):
    save(run, 100)
    assert ranking.rank(run) is None
    score(run, 100, stretches(0.0), split="test")
    assert ranking.rank(run) is None


def test_a_loss_that_is_not_a_number_is_never_the_best(run: RunDir):
    for step, loss in ((100, float("nan")), (200, 3.0)):
        save(run, step)
        score(run, step, loss)
    assert (ranked(run).best.step, ranked(run).proposed.step) == (200, 200)
    assert early_stop.saves_without_improvement(ledger.scores(run)) == []


@st.composite
def rankings(draw: st.DrawFn) -> Ranking:
    """Any losses, any places, any ties."""
    losses = draw(st.lists(st.sampled_from([2.5, 2.6, 2.7, 2.8]), min_size=1, max_size=8))
    scores = [record(100 * (number + 1), loss) for number, loss in enumerate(losses)]
    best = min(scores, key=lambda s: (s.loss, s.step))
    entries = [
        Entry(
            score=s,
            is_best=s is best,
            is_tie=s is not best and draw(st.booleans()),
            on_disk=draw(st.booleans()),
            uploaded=draw(st.booleans()),
        )
        for s in scores
    ]
    return Ranking(entries)


@given(rankings())
def test_the_proposed_one_is_there_and_as_good_and_as_early_as_can_be(found: Ranking):
    there = [e for e in found.entries if e.on_disk or e.uploaded]
    chosen = found.proposed
    assert chosen in (there or found.entries)
    equal = [e for e in there if e.is_best or e.is_tie]
    good = [e for e in equal if e.on_disk] or equal
    if good:
        assert chosen.step == min(e.step for e in good)
    elif there:
        assert chosen.score.loss == min(e.score.loss for e in there)
    else:
        assert chosen is found.best


# ---------------------------------------------------------------------------------------------- patience, overfitting


@pytest.mark.parametrize(
    ("losses", "since"), [([], 0), ([3.0], 0), ([3.0, 2.0], 0), ([3.0, 2.0, 2.0], 1), ([3.0, 2.0, 2.5, 2.1], 2)]
)
def test_saves_without_improvement_are_counted_from_the_first_lowest(losses: list[float], since: int):
    scored = {100 * n: record(100 * n, loss) for n, loss in enumerate(losses)}
    assert len(early_stop.saves_without_improvement(scored)) == since


def test_overfitting_that_chance_does_not_explain(run: RunDir):
    saved_and_scored(run, {100: 0.3, 200: 0.0, 300: 0.1, 400: 0.2})
    found = overfitting.judge(ranked(run))
    assert found.began
    assert found.rise == pytest.approx(0.2, abs=0.02)
    assert found.epochs_past == pytest.approx(6.4)
    text = found.describe()
    assert text.startswith("began after step 200 (epoch 6.40): 6.40 epochs past it the held-out loss is higher by 0.")
    assert "95%: +0." in text
    assert "the gap to the training loss went from" in text


def test_a_rise_that_chance_explains_is_not_overfitting(run: RunDir):
    saved_and_scored(run, {100: 0.3, 200: 0.0, 300: 0.001})
    found = overfitting.judge(ranked(run))
    assert not found.began
    assert "none that chance does not explain: 3.20 epochs past it" in found.describe()


def test_the_last_being_the_best_is_not_overfitting(run: RunDir):
    saved_and_scored(run, {100: 0.3, 200: 0.1, 300: 0.0})
    assert not overfitting.judge(ranked(run)).began
    assert overfitting.judge(ranked(run)).describe() == "none seen: the last checkpoint is the best one"


@pytest.mark.parametrize(("last", "perhaps"), [(3.02, False), (3.04, True)])
def test_without_intervals_a_rise_of_one_percent_is_doubtful(run: RunDir, last: float, perhaps: bool):
    """Nobody knows then whether it is chance."""
    for step, loss in ((100, 3.0), (200, last)):
        save(run, step)
        score(run, step, loss)
    found = overfitting.judge(ranked(run))
    assert (found.began, found.perhaps) == (False, perhaps)
    assert found.describe().startswith("perhaps since step 100" if perhaps else "none to speak of")
    assert ("not known whether that is chance" in found.describe()) is perhaps


def test_verdicts_say_that_checkpoints_wait_to_be_scored(run: RunDir):
    saved_and_scored(run, {100: 0.3, 200: 0.0})
    told = (ranked(run).reason(), overfitting.judge(ranked(run)).describe())
    save(run, 50, 3.5)
    assert (ranked(run).reason(), overfitting.judge(ranked(run)).describe()) == told  # not after those scored
    for step, loss in ((300, 2.5), (400, 2.25), (500, None)):
        save(run, step, loss)
    end = "; this is of the 2 scored so far: 3 later ones wait"
    assert overfitting.judge(ranked(run)).describe() == told[1] + end
    assert ranked(run).reason() == f"{told[0]}{end}; step 400's loss was lower at its save: 2.2500"


def test_the_first_of_several_that_cannot_be_told_apart_is_said_to_be_so_where_it_is(run: RunDir):
    saved_and_scored(run, {100: 0.0, 200: 0.0, 300: 0.0}, noise=0)
    upload(run, 100)
    shutil.rmtree(run.checkpoint(100))
    told = "steps 200 and 300 cannot be told from the best (step 100); 200 is the first of those on this disk"
    assert ranked(run).reason() == f"{told} (100 is on the Hub alone)"
    score(run, 200, stretches(-0.001, noise=0.1))
    assert ranked(run).reason() == (
        "the lowest held-out loss; steps 100 and 300 cannot be told from it; 200 is the first of those on this disk "
        "(100 is on the Hub alone)"
    )


def test_a_twin_of_the_best_cannot_be_told_from_it(run: RunDir):
    """The interval of two with the same losses is 0 to 0, and that contains 0."""
    saved_and_scored(run, {100: 0.0, 200: 0.0, 300: 0.2}, noise=0)
    found = ranked(run)
    assert found.entries[1].difference == (0.0, 0.0)
    assert [entry.is_tie for entry in found.entries] == [False, True, False]
    assert found.reason() == "the lowest held-out loss, and before step 200, which cannot be told from it"


@pytest.mark.parametrize(("rise", "began"), [(0.003, False), (0.012, True)])
def test_a_rise_that_is_sure_and_tiny_is_not_overfitting(run: RunDir, rise: float, began: bool):
    """On a large held-out split chance explains hardly anything: 0.1% is nothing to speak of, 0.4% is."""
    saved_and_scored(run, {100: 0.0, 200: rise}, noise=0)
    found = overfitting.judge(ranked(run))
    assert found.last.difference is not None
    assert found.last.difference[0] > 0
    assert found.began is began


def test_a_checkpoint_whose_manifest_is_damaged_is_not_proposed(run: RunDir):
    for step, loss in ((100, 3.5), (200, 3.25)):
        save(run, step, loss)
        jsonl.append(run.heldout, [{"step": step, "epoch": 1.0, "loss": loss}])
    (run.checkpoint(200) / manifest.NAME).write_text("{")
    chosen = choose.propose_on_disk(run, None)
    assert chosen is not None
    assert chosen.step == 100


def test_a_step_that_was_saved_again_is_another_checkpoint_for_who_looked_before_too(run: RunDir):
    """The service looks several times a second, and must not take the new one for the one that it has scored."""
    first = save(run, 100)
    assert manifest.identities(run) == {100: first}
    second = save(run, 100, content="other weights")
    assert second != first
    assert manifest.identities(run) == {100: second}
