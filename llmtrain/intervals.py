"""How much higher a checkpoint's held-out loss is than another one's, and how sure that is.

Two checkpoints are compared on the same text: the held-out split is cut into stretches, each checkpoint has a
loss sum for every stretch, and a paired bootstrap (Efron & Tibshirani 1993, chapter 8; Koehn 2004 for its use
between two models on one test set) draws the stretches again with replacement. Neighbouring stretches may be parts of
one document, which resemble each other, so blocks of neighbours are drawn where there are many (Carlstein 1986).

The best of many is the best by luck too, so the intervals are simultaneous: a multiple comparison with the best (Hsu
1984) whose critical value is that of all pairs (Tukey; see `critical_value`), because which one is the best is not
known beforehand. Where all are equal, any at all is called worse in about 5 of 100 cases, however many there are.
"""

from collections.abc import Iterable, Iterator

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
_BLOCK = 250
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
    draws_CD = np.concatenate(list(_draws(deltas, targets, seed)), axis=1)
    draws_CD -= draws_CD.mean(1, keepdims=True)
    best_1D = np.zeros((1, draws_CD.shape[1]))  # its difference to itself
    critical = _for_few(critical_value(np.concatenate([best_1D, draws_CD])), _degrees_of_freedom(targets))
    # What leaving a stretch out moves the mean by, for each of them.
    moved_CS = (deltas - means_C[:, None] * targets) / np.maximum(total - targets, 1.0)
    errors_C = np.sqrt((moved_CS**2).sum(1))
    half_C = critical * np.where(errors_C > _NO_ERROR, errors_C, 0.0)
    return [(float(mean - half), float(mean + half)) for mean, half in zip(means_C, half_C, strict=True)]


def _degrees_of_freedom(targets: Losses) -> float:
    """One less than the number of stretches of equal weight that would know the spread as well (Kish 1965)."""
    return float(targets.sum() ** 2 / max(1.0, (targets**2).sum())) - 1


def _draws(deltas: Losses, targets: Losses, seed: int) -> Iterator[Losses]:
    """(C, DRAWS) differences per token, some draws at a time: which stretches were drawn takes much memory."""
    generator, units = np.random.default_rng(seed), deltas.shape[1]
    for _ in range(0, DRAWS, _BLOCK):
        counts = generator.multinomial(units, np.full(units, 1 / units), size=_BLOCK).astype(np.float64)
        yield (deltas @ counts.T) / np.maximum(1.0, counts @ targets)


def critical_value(draws: Losses) -> float:
    """How many standard errors the farthest pair is apart in 95 of 100 draws.

    The best one may be any of them, so every pair counts. The largest difference to one fixed checkpoint is exceeded
    far too often: of ten that are equal, one at least is called worse in 35 of 100 cases (seven with all pairs).

    Args:
        draws: (C, D), of each row its mean taken away.
    """
    farthest_D = np.zeros(draws.shape[1])
    for number in range(len(draws) - 1):
        apart = draws[number + 1 :] - draws[number]
        errors = np.sqrt(np.einsum("cd,cd->c", apart, apart) / apart.shape[1])
        apart *= np.where(errors > _NO_ERROR, 1 / np.maximum(errors, _NO_ERROR), 0.0)[:, None]
        np.abs(apart, out=apart)
        np.maximum(farthest_D, apart.max(axis=0), out=farthest_D)
    return float(np.quantile(farthest_D, _LEVEL))


def _for_few(critical: float, freedom: float) -> float:
    """The quantile of Student's t in the place of the normal one (Cornish & Fisher's series): where stretches are few,
    the standard errors are uncertain themselves."""
    z = critical
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def merged(losses: Losses, most: int) -> Losses:
    """Neighbouring stretches added up, so that there are at most `most`."""
    size = -(-losses.shape[1] // most)
    return losses if size == 1 else np.add.reduceat(losses, np.arange(0, losses.shape[1], size), axis=1)
