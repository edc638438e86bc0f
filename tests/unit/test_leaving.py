"""How a rank's process ends: with the interpreter left standing (gloo's threads may still ask for it)."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cli import become
from llmtrain.__main__ import code_for_keeper
from llmtrain.errors import EXIT_CODES, EXIT_INTERRUPTED, EXIT_REQUEUE, DiskFull
from tests.support.checkpoint_runs import make_run, save, train

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


SAYS = "import contextlib\nwith contextlib.suppress(OSError): print('said')\n"
LEAVES = SAYS + "from llmtrain.__main__ import leave\nleave(75)"
FAILS = SAYS + "from llmtrain.errors import *\nwith exit_with_code(): raise ShardError('altered')"


@pytest.mark.parametrize("lost", ["2>&1 >/dev/full", ">/dev/full 2>&1", ">&-", ">&- 2>&-", "| true"])
def test_the_code_does_not_depend_on_who_reads_the_output(tmp_path: Path, lost: str, monkeypatch: pytest.MonkeyPatch):
    """`| true`, a log on a full disk, a closed output: the last lines are lost, and nothing else."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    run = make_run(tmp_path / "run", "service.start=never", "log.report=false")
    train(run, 20)
    save(run, 10)
    save(run, 20)
    for python, code in (
        (["-c", LEAVES], 75),
        (["-c", FAILS], 13),
        (["-m", "llmtrain.finish", str(run.path)], 0),
    ):
        command = shlex.join([sys.executable, *python])
        script = f"set -o pipefail; (sleep 0.3; {command}) {lost}"
        done = subprocess.run(["bash", "-c", script], text=True, capture_output=True, check=False)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
    assert run.summary.exists()


BEFORE = "finish.hold_ctrl_c(); os.kill(os.getpid(), signal.SIGINT); finish.become_finish(run)"
MEANWHILE = """
write = summary.write
def interrupted(*given, **named):
    os.kill(os.getpid(), signal.SIGINT)
    return write(*given, **named)
summary.write = interrupted
finish.main([str(run.path)])
"""
WAITING = """
def wait(_):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
finish.Companion.wait = wait
finish.main([str(run.path)])
"""


@pytest.mark.parametrize("when", [BEFORE, MEANWHILE, WAITING])
def test_ctrl_c_after_the_last_save_ends_the_wait_for_the_service_alone(tmp_path: Path, when: str):
    """The run is finished: it is summed up, without a traceback, and the code says so."""
    run = make_run(tmp_path / "run", f"service.start={'auto' if when is WAITING else 'never'}", "log.report=false")
    train(run, 20)
    save(run, 20)
    begin = "import os, signal, time\nfrom pathlib import Path\nfrom llmtrain import finish, summary\n"
    script = f"{begin}from llmtrain.rundir import RunDir\nrun = RunDir(Path({str(run.path)!r}))\n{when}"
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=False, timeout=50)
    assert done.returncode == 0, done.stderr
    assert "use checkpoint" in done.stdout
    assert ("service    goes on by itself" in done.stderr) == (when is WAITING)
    assert "Traceback" not in done.stderr


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


ERRORS = "from llmtrain.errors import *\nwith exit_with_code(): "


def test_a_full_disk_behind_the_output_is_no_bug(monkeypatch: pytest.MonkeyPatch):
    """Nor a success: Python writes what a short command prints only when that has ended."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    held = [f"print('said'{flushed}){then}" for flushed, then in ((", flush=True", ""), ("", ""), ("", ", exit()"))]
    commands = [shlex.join([sys.executable, "-c", ERRORS + code]) for code in held]
    for script in (*commands, f"{sys.executable} -m launcher schema"):
        done = subprocess.run(["bash", "-c", f"{script} >/dev/full"], text=True, capture_output=True, check=False)
        assert done.returncode == DiskFull.exit_code
        assert done.stderr.startswith("error: no space left for what this command writes or prints")
        assert done.stderr.count("\n") == 1


def test_letters_that_the_output_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    command = [sys.executable, "-c", f"{ERRORS}print('f\\u00fcr')"]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "f\\xfcr\n", "")


@pytest.mark.parametrize("when", ["import", "main"])
def test_ctrl_c_has_no_traceback(tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch):
    """Also while a module of the core is imported, which takes seconds where that imports torch."""
    interrupt = "import os, signal, sys\nos.kill(os.getpid(), signal.SIGINT)\n"
    late = f"def main():\n    {interrupt.replace(chr(10), chr(10) + '    ')}\nif __name__ == '__main__': main()"
    (tmp_path / "slow.py").write_text(interrupt if when == "import" else late)
    monkeypatch.chdir(tmp_path)
    started: list[str] = []
    monkeypatch.setattr(os, "execv", lambda _, words: started.extend(words))
    become("slow", "--word", "x")
    assert started[-3:] == ["slow", "--word", "x"]
    done = subprocess.run(started, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_INTERRUPTED, "", "")
