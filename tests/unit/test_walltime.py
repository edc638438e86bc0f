"""Time limits as SLURM writes them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher import walltime


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 5400), ("01:30", 90), ("24:00:00", 86_400), ("2-12", 216_000), ("2-12:30", 217_800),
        ("1-00:00:01", 86_401), ("UNLIMITED", None), ("INVALID", None), ("0", None), ("0:00", 0),
    ],
)  # fmt: skip
def test_seconds(text: str, expected: float | None):
    assert walltime.seconds(text) == expected


@pytest.mark.parametrize("text", ["", "1h", "1:2:3:4", "-5", "1-", "1.5", "²"])
def test_seconds_of_nonsense(text: str):
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        walltime.seconds(text)


@given(st.integers(0, 400), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_seconds_of_what_slurm_prints(days: int, hours: int, minutes: int, seconds: int):
    """%L: the shortest of M:SS, H:MM:SS and D-HH:MM:SS."""
    text = f"{minutes}:{seconds:02}"
    if days or hours:
        text = f"{hours}:{minutes:02}:{seconds:02}"
    if days:
        text = f"{days}-{hours:02}:{minutes:02}:{seconds:02}"
    assert walltime.seconds(text) == ((days * 24 + hours) * 60 + minutes) * 60 + seconds
