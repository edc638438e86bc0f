"""How much higher a checkpoint's held-out loss is than another one's, and how sure that is.

Two checkpoints are compared on the same text: the held-out split is cut into stretches, each checkpoint has a
loss sum for every stretch, and a paired bootstrap (Efron & Tibshirani 1993, chapter 8; Koehn 2004 for its use
between two models on one test set) draws the stretches again with replacement. Neighbouring stretches may be parts of
one document, which resemble each other, so blocks of neighbours are drawn where there are many (Carlstein 1986).

The best of many is the best by luck too, so the intervals are simultaneous: a multiple comparison with the best (Hsu
1984) whose critical value is that of all pairs (Tukey; see `critical_value`), because which one is the best is not
known beforehand. Where all are equal, any at all is called worse in about 5 of 100 cases, however many there are.
"""

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
MAX_UNITS = 2048
"""Stretches that are recorded."""
MIN_UNITS = 16
"""With fewer stretches no interval is given: their spread is not known well enough for a bootstrap."""
MAX_BLOCKS = 32
"""Of neighbours, drawn in the bootstrap: few enough to be long, so that they hardly resemble each other; with 32 the
intervals are 4% wider than with very many."""
_MIN_FREEDOM = 3
_GROUP = 32
"""Neighbouring checkpoints, which resemble each other."""
_LEVEL = 0.95
_NO_ERROR = 1e-9
"""A standard error of this many nats per token or less is rounding: the two have the same losses, or differ by the
same everywhere."""

Losses = NDArray[np.float64]
"""(2, S): loss sums in nats, and supervised tokens, of S stretches of a split."""
Interval = tuple[float, float]


def compare(reference: Losses | None, others: Iterable[Losses | None], count: int) -> list[Interval | None]:
    """`simultaneous` intervals of the others' losses minus the reference's, the best one.

    None for one without finite losses on the reference's stretches.

    Args:
        others: `count` of them, read one at a time: all losses of a long run do not fit in memory.
    """
    result: list[Interval | None] = [None] * count
    if reference is None or reference.shape[1] < MIN_UNITS or not np.isfinite(reference[0]).all():
        return result
    reference = merged(reference, MAX_UNITS)  # an older version recorded more
    targets = merged(reference[1:], MAX_BLOCKS)[0]
    if _degrees_of_freedom(targets) < _MIN_FREEDOM:
        return result
    found: dict[int, Losses] = {}
    for number, recorded in enumerate(others):
        if recorded is None:
            continue
        other = merged(recorded, MAX_UNITS)
        if np.array_equal(other[1], reference[1]) and np.isfinite(other[0]).all():
            found[number] = merged((other[0] - reference[0])[None], MAX_BLOCKS)[0]
    if found:
        together = simultaneous(np.stack(list(found.values())), targets)
        for number, interval in zip(found, together, strict=True):
            result[number] = interval
    return result


def simultaneous(deltas: Losses, targets: Losses, seed: int = 0) -> list[Interval]:
    """Simultaneous 95% intervals of sum(delta) / sum(targets), the stretches drawn anew with replacement.

    The standard errors are the jackknife's, each stretch left out once (Efron & Tibshirani, chapter 11): the
    bootstrap's are too small where a few long stretches hold most of the tokens. The critical value is the bootstrap's.

    Args:
        deltas: (C, S) differences of loss sums to those of the best; targets: (S,) supervised tokens.
    """
    total = max(1.0, targets.sum())
    means_C = deltas.sum(1) / total
    critical = _for_few(critical_value(deltas, _weights(targets, seed)), _degrees_of_freedom(targets))
    # What leaving a stretch out moves the mean by, for each of them.
    moved_CS = (deltas - means_C[:, None] * targets) / np.maximum(total - targets, 1.0)
    errors_C = np.sqrt((moved_CS**2).sum(1))
    half_C = critical * np.where(errors_C > _NO_ERROR, errors_C, 0.0)
    return [(float(mean - half), float(mean + half)) for mean, half in zip(means_C, half_C, strict=True)]


def _degrees_of_freedom(targets: Losses) -> float:
    """One less than the number of stretches of equal weight that would know the spread as well (Kish 1965)."""
    return float(targets.sum() ** 2 / max(1.0, (targets**2).sum())) - 1


def _weights(targets: Losses, seed: int) -> Losses:
    """(S, DRAWS): how much a stretch's difference counts in each draw's difference per token, less its mean over the
    draws."""
    generator, units = np.random.default_rng(seed), len(targets)
    counts_DS = generator.multinomial(units, np.full(units, 1 / units), size=DRAWS).astype(np.float64)
    weights_SD = (counts_DS / np.maximum(1.0, counts_DS @ targets)[:, None]).T
    return weights_SD - weights_SD.mean(1, keepdims=True)


def critical_value(deltas: Losses, weights: Losses) -> float:
    """How many standard errors the farthest pair is apart in 95 of 100 draws.

    The best one may be any of them, so every pair counts. The largest difference to one fixed checkpoint is exceeded
    far too often: of ten that are equal, one at least is called worse in 35 of 100 cases (seven with all pairs).

    Args:
        deltas: (C, S) differences of loss sums to those of the best; weights: (S, D), as `_weights` makes them.
    """
    deltas_CS = np.concatenate([np.zeros((1, len(weights))), deltas])  # the best one's difference to itself
    # The root mean square of a pair's difference over the draws is the distance of two points.
    _, root_SS = np.linalg.qr(weights.T / np.sqrt(weights.shape[1]))
    points_CS = deltas_CS @ root_SS.T
    return float(np.quantile(_farthest(deltas_CS @ weights, points_CS), _LEVEL))


def _farthest(draws: Losses, points: Losses) -> Losses:
    """(D,) how many standard errors the farthest pair is apart, in the draws that decide the quantile; less than that
    in others.

    Pairs are many (2 million of 2,000 checkpoints), and few are ever the farthest. So neighbours form groups, and
    pairs are computed in those draws alone in which the widest difference between two groups, in the smallest standard
    error of any of their pairs, is more than what was found already.

    Args:
        draws: (C, D); points: (C, S), whose distances are the standard errors.
    """
    groups = [slice(first, first + _GROUP) for first in range(0, len(draws), _GROUP)]
    low_GD, high_GD = (np.stack([end(draws[group], axis=0) for group in groups]) for end in (np.min, np.max))

    def errors(one: int, two: int) -> Losses:
        apart = points[groups[one], None] - points[None, groups[two]]
        found = np.sqrt(np.einsum("abs,abs->ab", apart, apart))
        return np.where(found > _NO_ERROR, found, np.inf)  # two that never differ are never apart

    def widest(one: int, two: int, error: float) -> Losses:
        return np.maximum(high_GD[one] - low_GD[two], high_GD[two] - low_GD[one]) / error

    num_draws = draws.shape[1]
    deciding = num_draws - math.floor(_LEVEL * (num_draws - 1))  # so many of the largest ones make the quantile
    farthest_D = np.zeros(num_draws)
    pairs = [(one, two, float(errors(one, two).min())) for one in range(len(groups)) for two in range(one, len(groups))]
    for one, two, error in sorted(pairs, key=lambda pair: -widest(*pair).sum()):
        least = np.partition(farthest_D, -deciding)[-deciding]
        if not (widest(one, two, error) > np.maximum(farthest_D, least)).any():
            continue
        others_GD = draws[groups[two]]
        for draws_D, errors_G in zip(draws[groups[one]], errors(one, two), strict=True):
            reach_D = np.maximum(high_GD[two] - draws_D, draws_D - low_GD[two]) / errors_G.min()
            chosen = np.flatnonzero(reach_D > np.maximum(farthest_D, least))
            if len(chosen):
                apart_GD = np.abs(others_GD[:, chosen] - draws_D[chosen]) / errors_G[:, None]
                farthest_D[chosen] = np.maximum(farthest_D[chosen], apart_GD.max(axis=0))
    return farthest_D


def _for_few(critical: float, freedom: float) -> float:
    """The quantile of Student's t in the place of the normal one (Cornish & Fisher's series): where stretches are few,
    the standard errors are uncertain themselves."""
    z = critical
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def merged(losses: Losses, most: int) -> Losses:
    """Neighbouring stretches added up, so that there are at most `most`."""
    size = -(-losses.shape[1] // most)
    return losses if size == 1 else np.add.reduceat(losses, np.arange(0, losses.shape[1], size), axis=1)
