"""Time limits as SLURM writes them."""

import re

_UNITS_S = (1, 60, 3600)


def seconds(limit: str) -> float | None:
    """SLURM's "[days-]hours:minutes:seconds" (or "minutes:seconds", or "minutes") in seconds; None: no limit.

    Raises:
        ValueError: it is none of these.
    """
    if limit.upper() in ("UNLIMITED", "INFINITE", "NOT_SET", "INVALID", "N/A", "0"):  # sbatch --time=0: no limit
        return None
    matched = re.fullmatch(r"(?:(\d+)-)?(\d+(?::\d+){0,2})", limit)
    if not matched:
        raise ValueError(f"{limit!r} is not a time such as 90, 24:00:00 or 2-12:00:00")
    days, clock = matched.groups()
    numbers = [int(number) for number in clock.split(":")]
    if days is not None:  # D-HH[:MM[:SS]]
        numbers += [0] * (3 - len(numbers))
    elif len(numbers) == 1:
        numbers.append(0)
    return int(days or 0) * 86_400 + sum(n * unit for n, unit in zip(reversed(numbers), _UNITS_S, strict=False))


def clock(seconds: float) -> str:
    """`24:00:00`."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest:02}"
