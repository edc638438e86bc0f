"""How the benchmarks write a figure."""

import statistics


def with_range(values: list[float], form: str = ",.0f") -> str:
    """`median (least to most)`."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
