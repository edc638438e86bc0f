"""How a rank's process ends: with the interpreter left standing (gloo's threads may still ask for it)."""

import subprocess
import sys

import pytest

SCRIPT = """
import atexit
from llmtrain.__main__ import leave

class Told:
    def __del__(self):
        print("torn down")

told = Told()
told.itself = told
atexit.register(print, "exit function")
print("work", end=" ")
leave({code!r})
"""


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (None, 0), (17, 17), ("said why", 1)])
def test_a_rank_leaves_without_taking_the_interpreter_down(code: object, expected: int):
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(code=code)], text=True, capture_output=True, check=False)
    assert done.returncode == expected
    assert done.stdout == "work exit function\n"  # flushed, and nothing torn down
    assert done.stderr == ("said why\n" if expected == 1 else "")
