"""Numbers of things, steps and lists, as sentences for people have them."""

from collections.abc import Iterable


def count(number: int, noun: str) -> str:
    """`1 rank`, `2,048 ranks`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def listed(parts: Iterable[object], most: int = 6) -> str:
    """`1, 2 and 3`; of many the first ones and how many more; `none`."""
    texts = [str(part) for part in parts]
    if len(texts) > most:
        texts = [*texts[: most - 1], f"{len(texts) - most + 1} more"]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}" if texts else "none"


def name_steps(numbers: Iterable[int]) -> str:
    """`step 300`, `steps 300 and 400`."""
    found = list(numbers)
    return f"step {found[0]}" if len(found) == 1 else f"steps {listed(found)}"


def name_range(first: int, last: int) -> str:
    """`step 7`, `steps 3 to 7`."""
    return f"step {last:,}" if first == last else f"steps {first:,} to {last:,}"
