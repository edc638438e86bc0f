"""Whether the intervals between checkpoints are right: how often they call a difference sure that is none."""

import io
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rich.console import Console

from launcher.choosing import listing
from launcher.report.compare import compare_runs
from launcher.report.compare_page import compare
from llmtrain import intervals, ledger
from llmtrain.rundir import RunDir
from tests.support.checkpoint_runs import TARGETS, make_run, save, score, stretches


def above_the_best(losses: NDArray[np.float64]) -> list[bool]:
    """Of (K, S) losses of single tokens, which rows are called worse than the lowest one."""
    best = losses.sum(1).argmin()
    deltas = np.delete(losses - losses[best], best, axis=0)
    return [low > 0 for low, _ in intervals.simultaneous(deltas, np.ones(losses.shape[1]))]


# ------------------------------------------------------------------------------------------------ one against the best


def test_a_difference_that_is_the_same_everywhere_is_certain():
    targets = np.random.default_rng(0).integers(1, 200, 50).astype(float)
    [(low, high)] = intervals.simultaneous(0.25 * targets[None], targets)
    assert (low, high) == pytest.approx((0.25, 0.25))


def test_identical_losses_are_a_tie_and_do_not_widen_the_others():
    targets = np.full(50, 3.0)
    other = np.random.default_rng(0).normal(0.1, 1, (1, 50))
    [alone] = intervals.simultaneous(other, targets)
    same, also, beside, twin = intervals.simultaneous(np.concatenate([np.zeros((2, 50)), other, other]), targets)
    assert same == also == (0.0, 0.0)
    assert beside == twin == pytest.approx(alone)


def test_on_many_stretches_it_is_the_normal_interval():
    generator = np.random.default_rng(1)
    targets = generator.integers(20, 200, 2000).astype(float)
    delta = targets * generator.normal(0.02, 0.2, 2000)
    ratio = delta.sum() / targets.sum()
    error = np.sqrt(((delta - ratio * targets) ** 2).sum()) / targets.sum()  # of a ratio of two sums
    [(low, high)] = intervals.simultaneous(delta[None], targets)
    assert (low, high) == pytest.approx((ratio - 1.96 * error, ratio + 1.96 * error), abs=0.12 * error)


def test_more_stretches_than_blocks_are_added_up_to_the_same_interval():
    """Give or take: a spread known from so few blocks is itself uncertain by an eighth, so many cases are averaged."""
    generator = np.random.default_rng(2)
    count = 3 * intervals.MAX_UNITS + 17
    reference = np.stack([np.full(count, 200.0), np.full(count, 64.0)])
    error, found, means = 0.3 / np.sqrt(count), [], []
    for _ in range(40):
        delta = 64 * generator.normal(0.01, 0.3, count)
        found += intervals.compare(reference, [np.add(reference, [delta, np.zeros(count)])], 1)
        means.append(delta.mean() / 64)
    low, high = np.mean(found, axis=0)
    assert (low, high) == pytest.approx(
        (np.mean(means) - 1.96 * error, np.mean(means) + 1.96 * error), abs=0.15 * error
    )
    assert np.mean([low <= 0.01 <= high for low, high in found]) >= 0.85


def test_neighbours_that_resemble_each_other_do_not_count_as_so_much_text():
    """Parts of one document: what one says about two checkpoints, the next says too."""
    generator = np.random.default_rng(5)
    called: list[bool] = []
    for _ in range(100):
        noise = generator.normal(0, 1, (10, 1600))
        for place in range(1, noise.shape[1]):
            noise[:, place] = 0.7 * noise[:, place - 1] + np.sqrt(1 - 0.7**2) * noise[:, place]
        losses = [np.stack([64 * (3 + 0.5 * row), np.full(row.size, 64.0)]) for row in noise]
        best = losses.pop(int(noise.sum(1).argmin()))
        called.append(any(found is not None and found[0] > 0 for found in intervals.compare(best, losses, len(losses))))
    assert np.mean(called) <= 0.11


@pytest.mark.parametrize("count", [100, 500])
def test_a_few_long_documents_do_not_make_it_sure(count: int):
    generator = np.random.default_rng(6)
    called: list[bool] = []
    for _ in range(150):
        tokens = np.round(100 * np.exp(generator.normal(0, 1.5, count))) + 1
        losses = [np.stack([tokens * row, tokens]) for row in generator.normal(3, 0.5, (10, count))]
        best = losses.pop(int(np.argmin([row.sum() for row, _ in losses])))
        called.append(any(found is not None and found[0] > 0 for found in intervals.compare(best, losses, len(losses))))
    assert np.mean(called) <= 0.09


@pytest.mark.parametrize(("count", "least"), [(intervals.MIN_UNITS, 0.91), (60, 0.92)])
def test_it_covers_the_true_difference_in_about_95_of_100_cases(count: int, least: float):
    generator = np.random.default_rng(3)
    truth = 0.01
    targets = generator.integers(32, 128, count).astype(float)
    deltas = targets * generator.normal(truth, 0.1, (300, count))
    found = [intervals.simultaneous(delta[None], targets)[0] for delta in deltas]
    assert least <= np.mean([low <= truth <= high for low, high in found]) <= 0.98


def test_a_stretch_is_as_heavy_as_its_tokens():
    """Two stretches that differ by +1 and -1 a token: the sign is that of the one with more of them."""
    targets = np.tile([3.0 * TARGETS, 1.0 * TARGETS], 100)
    [(low, high)] = intervals.simultaneous((targets * np.tile([1.0, -1.0], 100))[None], targets)
    assert 0.3 < low < 0.5 < high < 0.7


@settings(max_examples=30, deadline=None)
@given(
    deltas=st.lists(st.integers(-50, 50), min_size=16, max_size=40),
    factor=st.sampled_from([0.125, 0.3, 7.0]),
    seed=st.integers(0, 5),
)
def test_the_interval_is_ordered_seeded_and_scales(deltas: list[int], factor: float, seed: int):
    delta, targets = np.array(deltas, float)[None], np.full(len(deltas), 3.0)
    [(low, high)] = intervals.simultaneous(delta, targets, seed)
    assert low <= delta.mean() / 3 + 1e-9
    assert high >= delta.mean() / 3 - 1e-9
    assert intervals.simultaneous(delta, targets, seed) == [(low, high)]
    assert intervals.simultaneous(-delta, targets, seed)[0] == pytest.approx((-high, -low))
    assert intervals.simultaneous(factor * delta, targets, seed)[0] == pytest.approx(
        (factor * low, factor * high), abs=1e-6
    )


# ------------------------------------------------------------------------------------------------ many against the best


@pytest.mark.parametrize(("many", "count", "times"), [(2, 60, 200), (10, 60, 200), (10, intervals.MIN_UNITS, 200)])
def test_of_equal_checkpoints_hardly_ever_is_any_called_worse(many: int, count: int, times: int):
    """The lowest of ten is lower than most by luck: compared with it one by one, one is called worse in 65 of 100
    cases. Nine is 5 and two and a half standard errors of a simulation this long."""
    generator = np.random.default_rng(7)
    called = [any(above_the_best(generator.normal(3, 0.5, (many, count)))) for _ in range(times)]
    assert np.mean(called) <= 0.09


def test_one_that_is_worse_is_still_found_among_ten():
    generator = np.random.default_rng(8)
    count, error = 200, 0.5 * np.sqrt(2 / 200)
    shifts = np.array([0, *[0] * 8, 6 * error])[:, None]
    assert all(above_the_best(generator.normal(3 + shifts, 0.5, (10, count)))[-1] for _ in range(20))


@pytest.mark.parametrize(("largest", "given"), [(64, True), (16 * 64, False)])
def test_one_document_that_is_most_of_the_text_gives_no_interval(largest: int, given: bool):
    """What is known of the spread is then one figure, however many stretches there are."""
    targets = np.full(intervals.MIN_UNITS, 64.0)
    targets[3] = largest
    reference, other = (np.stack([targets * per_token, targets]) for per_token in (3.0, 3.1))
    (found,) = intervals.compare(reference, [other], 1)
    assert (found is not None) == given


def test_losses_that_are_not_finite_have_no_interval_and_change_none():
    reference = np.stack([np.full(50, 200.0), np.full(50, 64.0)])
    other = np.add(reference, [np.random.default_rng(0).normal(0.1, 1, 50), np.zeros(50)])
    broken = [np.add(reference, [np.r_[value, np.zeros(49)], np.zeros(50)]) for value in (np.nan, np.inf)]
    assert intervals.compare(reference, [*broken, other], 3) == [None, None, *intervals.compare(reference, [other], 1)]
    assert intervals.compare(broken[0], [reference], 1) == [None]


def plain_critical_value(draws: NDArray[np.float64]) -> float:
    """Every pair in every draw."""
    farthest = np.zeros(draws.shape[1])
    for number in range(len(draws)):
        apart = draws[number + 1 :] - draws[number]
        errors = np.sqrt((apart**2).mean(1))
        scaled = np.abs(apart[errors > 1e-9]) / errors[errors > 1e-9, None]
        farthest = np.maximum(farthest, scaled.max(0, initial=0.0))
    return float(np.quantile(farthest, 0.95))


@pytest.mark.parametrize("kind", ["unlike", "in small steps", "falling", "of few kinds", "with twins"])
def test_the_pairs_that_are_passed_over_decide_nothing(kind: str):
    """Every 40th checkpoint is at random places, so that groups of neighbours are not all alike."""
    generator = np.random.default_rng(12)
    for count, units in ((1, 16), (2, 32), (40, 17), (200, 32)):
        targets = np.round(np.exp(generator.normal(7, 1, units)))
        each = generator.normal(0, 0.1, (count, units))
        per_token = {
            "unlike": each,
            "in small steps": each.cumsum(0),
            "falling": 3 * np.exp(-np.arange(count) / 20)[:, None] + 0.1 * each.cumsum(0),
            "of few kinds": np.sin(np.arange(count))[:, None] * each[0] + np.cos(np.arange(count))[:, None] * each[-1],
            "with twins": np.repeat(each, 4, axis=0)[:count],
        }[kind]
        per_token[::40] += generator.normal(0, 1, per_token[::40].shape)
        deltas, weights = per_token * targets, intervals._weights(targets, seed=count)
        draws = np.concatenate([np.zeros((1, weights.shape[1])), deltas @ weights])
        assert intervals.critical_value(deltas, weights) == pytest.approx(plain_critical_value(draws), rel=1e-9)


def test_five_hundred_checkpoints_take_little_memory():
    reference = np.stack([np.full(2048, 200.0), np.full(2048, 64.0)])
    generator = np.random.default_rng(9)
    others = (np.add(reference, [generator.normal(0.1, 1, 2048), np.zeros(2048)]) for _ in range(499))
    tracemalloc.start()
    found = intervals.compare(reference, others, 499)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert None not in found
    assert peak < 100 * 2**20


# ------------------------------------------------------------------------------------------------ two precisions


def rescored(run: RunDir, step: int, losses: intervals.Losses, how: str) -> None:
    ledger.append(run.scores, score(run, step, losses).model_copy(update={"how": how}))


def test_the_reason_for_a_missing_interval_is_the_precision(tmp_path: Path):
    run = make_run(tmp_path / "run")
    for step, shift, how in ((100, 0.0, "cuda:0 fp32"), (200, 0.1, "cuda:0 bf16"), (300, 0.2, "cuda:0 bf16")):
        save(run, step)
        rescored(run, step, stretches(shift), how)
    save(run, 400)
    other = stretches(0.1)
    other[1, 3] += 1  # one token more is supervised
    rescored(run, 400, other, "cpu fp32")
    assert listing.gather(run).notes == [
        "no interval for steps 200 and 300: computed in bf16, the best one in fp32: rounding alone shifts a loss",
        "no interval for step 400: no finite losses by stretch, or of another held-out text",
    ]


def test_two_runs_in_two_precisions_have_no_sure_difference(tmp_path: Path):
    """Shifted alike everywhere: paired, that would be certain."""
    runs = [make_run(tmp_path / name) for name in "abc"]
    for run, shift, how in zip(runs, (0.0, 0.001, 0.002), ("cpu fp32", "cuda:0 bf16", "cuda:0 fp32"), strict=True):
        save(run, 100)
        rescored(run, 100, stretches(shift), how)
    found = compare_runs(runs)
    assert not found.doubts
    assert found.differences[:2] == [None, None]
    assert found.differences[2] == pytest.approx((0.002, 0.002))
    said = "no interval for b: computed in bf16, a in fp32: rounding alone shifts a loss"
    assert found.caveats == [said]
    out = io.StringIO()
    page = compare([run.path for run in runs], None, Console(file=out, width=160))
    assert said in out.getvalue()
    assert said[1:] in page.read_text()


def test_the_best_of_many_runs_is_not_surely_the_best(tmp_path: Path):
    """Ten runs that differ by noise alone."""
    runs = [make_run(tmp_path / str(number)) for number in range(10)]
    generator = np.random.default_rng(10)
    for run in runs:
        save(run, 100)
        losses = stretches(0.0)
        score(run, 100, np.stack([losses[0] + TARGETS * generator.normal(0, 0.3, 200), losses[1]]))
    found = compare_runs(runs)
    ties = [found.is_tie(place) for place in range(1, 10)]
    assert ties == [True] * 9
    two = compare_runs([found.contenders[0].facts.run, found.contenders[-1].facts.run])
    assert not two.is_tie(1)  # compared by themselves, they differ by more than chance


def test_on_few_stretches_it_is_hardly_wider_than_students():
    """Narrower it would call too much sure; and with 16 stretches all that keeps intervals wide enough counts."""
    generator, count = np.random.default_rng(11), intervals.MIN_UNITS
    students = 2.1314 / np.sqrt(count)  # t of 15 degrees of freedom, at 97.5%
    found: list[float] = []
    for seed, delta in enumerate(generator.normal(0, 1, (100, count))):
        [(low, high)] = intervals.simultaneous(delta[None], np.ones(count), seed)
        found.append((high - low) / 2 / delta.std(ddof=1) / students)
    assert 1.0 < np.mean(found) < 1.05
