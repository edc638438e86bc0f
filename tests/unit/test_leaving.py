"""How a rank's process ends: with the interpreter left standing (gloo's threads may still ask for it)."""

import subprocess
import sys

import pytest

from llmtrain.__main__ import code_for_keeper
from llmtrain.errors import EXIT_CODES, EXIT_REQUEUE

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


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ((), 75),
        ((EXIT_CODES,), 75),
        ((EXIT_CODES, "WORLD_SIZE", "RANK"), 75),  # as containers and Kubernetes set them for one process
        ((EXIT_CODES, "WORLD_SIZE", "TORCHELASTIC_RUN_ID"), 0),
        (("WORLD_SIZE", "TORCHELASTIC_RUN_ID"), 75),
    ],
)
def test_a_stopped_run_reads_as_finished_only_for_torchrun(
    variables: tuple[str, ...], told: int, monkeypatch: pytest.MonkeyPatch
):
    for name in (EXIT_CODES, "WORLD_SIZE", "RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name in variables:
        monkeypatch.setenv(name, "1")
    assert code_for_keeper(EXIT_REQUEUE) == told
    assert (code_for_keeper(0), code_for_keeper(17)) == (0, 17)
