"""Numbers and times as a page shows them, beyond what launcher/display.py has for terminals."""

import math
import time


def loss(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:.4f}" if math.isfinite(value) else "not finite"


def signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "\u2212")


def interval(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f"{signed(bounds[0])} to {signed(bounds[1])}"


def figure(value: float | None, digits: int = 2) -> str:
    if value is None or not math.isfinite(value):
        return "\u2013"
    return f"{value:,.{digits}f}" if abs(value) < 1e6 else f"{value:.2e}"


def quantity(value: float) -> str:
    """`12,345`, `1.2 million`, `3.4 billion`."""
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:,.0f}"


def moment(seconds: float, seconds_too: bool = False) -> str:
    """Local time."""
    return time.strftime("%d %b %H:%M:%S" if seconds_too else "%d %b %Y, %H:%M", time.localtime(seconds)).lstrip("0")


def capital(text: str) -> str:
    """What begins a sentence of its own."""
    return text[:1].upper() + text[1:]
