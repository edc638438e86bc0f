"""`llmtrain logs`: the right file, its end, and what comes."""

import os
import signal
import subprocess
import sys
import threading
import time
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from launcher.watching import logs
from launcher.watching.logs import Wanted, find, show_logs, start_of_last
from llmtrain.errors import RunFolderError
from llmtrain.rundir import RunDir
from tests.support.checkpoint_runs import make_run, save, train
from tests.support.jobs import Slurm, submitted
from tests.support.runs import environment


@pytest.fixture(autouse=True)
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    return Slurm(tmp_path / "bin", monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = make_run(tmp_path / "runs" / "gpt", "train.steps=1000")
    made.log.write_text("one\ntwo\nthree\n")
    return made


def write(path: Path, text: str, age_s: float = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (time.time() - age_s,) * 2)
    return path


# Which file


def test_the_log_and_its_end(run: RunDir, capsys: pytest.CaptureFixture[str]):
    show_logs(run.path, Wanted(), False, None)
    assert capsys.readouterr() == ("one\ntwo\nthree\n", f"==> {run.log} <==\n")
    show_logs(run.path, Wanted(), False, 2)
    assert capsys.readouterr().out == "two\nthree\n"


def test_no_such_run(tmp_path: Path):
    with pytest.raises(RunFolderError, match="nope: no such folder"):
        show_logs(tmp_path / "nope", Wanted(), False, None)


def test_before_there_is_a_log_the_job_speaks(tmp_path: Path, slurm: Slurm):
    run = RunDir(tmp_path / "runs" / "new")
    jobs = submitted(run, "12")
    slurm.queued("12|PENDING|Resources||1:00:00|N/A")
    with pytest.raises(RunFolderError, match=r"new: nothing was said yet; job 12 .*: pending, waits for free nodes"):
        find(run, Wanted())
    with pytest.raises(RunFolderError, match=r"no node of it has said anything yet; job 12 "):
        find(run, Wanted(node=0))
    written = write(jobs.folder("12") / "12_0_log.out", "error: no shards")
    assert find(run, Wanted()) == written


def test_output_by_node_is_that_of_the_newest_job(run: RunDir):
    jobs = submitted(run, "12")
    submitted(run, "13")
    submitted(run, "14", kind="service")
    write(jobs.folder("12") / "12_0_log.out", "old", age_s=90)
    second = write(jobs.folder("12") / "12_1_log.out", "old", age_s=90)
    newest = write(jobs.folder("13") / "13_0_log.out", "new", age_s=30)
    write(jobs.folder("14") / "14_0_log.out", "the service")
    assert find(run, Wanted(node=0)) == newest
    assert find(run, Wanted(node=1)) == second
    with pytest.raises(RunFolderError, match="no output of node 7; there is that of node 0 and 1 in "):
        find(run, Wanted(node=7))
    run.log.touch()  # the newest job has come that far
    assert find(run, Wanted()) == run.log


def test_a_job_that_failed_before_it_came_to_the_log_speaks_for_itself(run: RunDir, capsys: pytest.CaptureFixture[str]):
    submitted(run, "12")
    write(run.log, "one\n", age_s=60)
    assert find(run, Wanted()) == run.log  # it waits
    jobs = submitted(run, "13")
    first = write(jobs.folder("12") / "12_0_log.out", "ended", age_s=-60)
    assert find(run, Wanted()) == run.log  # what an older job says at its very end
    first.unlink()
    failed = write(jobs.folder("13") / "13_0_log.out", "error: no module named torch\n")
    show_logs(run.path, Wanted(), False, None)
    assert capsys.readouterr() == (
        "error: no module named torch\n",
        f"==> {failed} <==\n(the newest job's own output; what was said before it: {run.log})\n",
    )
    with run.log.open("a") as log:
        log.write("two\n")
    assert find(run, Wanted()) == run.log


def test_output_by_rank_is_that_of_the_newest_start(run: RunDir):
    jobs = submitted(run, "12")
    for restart, age in ((2, 90.0), (10, 30.0)):
        for rank in (1, 2, 3)[: 3 if restart == 2 else 1]:
            write(jobs.start("12", restart) / "ranks" / f"rank-{rank}.log", "", age)
    assert find(run, Wanted(rank=1)) == jobs.start("12", 10) / "ranks" / "rank-1.log"
    with pytest.raises(RunFolderError, match=r"no output of rank 3; .*start-12-10/ranks has that of rank 1$"):
        find(run, Wanted(rank=3))
    assert find(run, Wanted(rank=0)) == run.log  # it speaks for all
    first = write(jobs.folder("12") / "12_0_log.out", "")
    assert find(run, Wanted(rank=0)) == first
    here = write(jobs.path / "local" / "ranks" / "rank-3.log", "")
    assert find(run, Wanted(rank=3)) == here


def test_a_run_without_output_by_rank_or_node(run: RunDir):
    with pytest.raises(RunFolderError, match="no rank has a file of its own"):
        find(run, Wanted(rank=1))
    with pytest.raises(RunFolderError, match="only jobs that were submitted have output by node"):
        find(run, Wanted(node=0))


# Its end


@given(st.lists(st.binary(max_size=8)), st.booleans(), st.integers(0, 12), st.integers(1, 9))
@example([b"a\rb"], True, 1, 3)
def test_the_last_lines(parts: list[bytes], ended: bool, lines: int, block: int):
    content = b"\n".join(part.replace(b"\n", b"") for part in parts) + (b"\n" if ended and parts else b"")
    expected = content.split(b"\n")[-lines - 1 :] if content.endswith(b"\n") else content.split(b"\n")[-lines:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "_BLOCK", block)
        found = content[start_of_last(BytesIO(content), lines) :]
    assert found == (b"\n".join(expected) if lines else b"")


def test_what_a_terminal_is_shown():
    assert logs._shown("  3%\r 50%\r100%") == "100%"
    assert logs._shown("100%\r") == "100%"
    assert logs._shown("a\tb\x1b[2J") == "a    b\\x1b[2J"


# What comes


def follow(run: RunDir, *words: str, errors: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "launcher", "logs", str(run.path), "--follow", *words],
        env=environment(), text=True, stdout=subprocess.PIPE, stderr=errors,
    )  # fmt: skip


def test_following_waits_for_a_job_to_start(tmp_path: Path, slurm: Slurm):
    run = RunDir(tmp_path / "runs" / "new")
    jobs = submitted(run, "12")
    slurm.queued("12|PENDING|Resources||1:00:00|N/A")
    process = follow(run, errors=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert "new: nothing was said yet; job 12 of big (train): pending" in process.stderr.readline()
    write(jobs.folder("12") / "12_0_log.out", "starting\n")
    assert process.stdout.readline() == "starting\n"
    made = make_run(run.path)
    made.log.write_text("training\n")
    assert process.stdout.readline() == "training\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0


def test_following_a_job_that_goes_on_shows_nothing_of_before_it(run: RunDir, slurm: Slurm):
    write(run.log, "one\n", age_s=60)
    jobs = submitted(run, "12")
    slurm.queued("12|RUNNING|None|n1|1:00:00|N/A")
    write(jobs.folder("12") / "12_0_log.out", "loading\n")
    process = follow(run)
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    with run.log.open("a") as log:
        log.write("two\n")
    assert process.stdout.readline() == "two\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0


def test_following_goes_on_in_new_files_until_the_run_has_ended(run: RunDir):
    process = follow(run, "-n", "1")
    assert process.stdout is not None
    assert process.stdout.readline() == "three\n"
    with run.log.open("a") as log:
        log.write("four\n")
    assert process.stdout.readline() == "four\n"
    run.log.rename(run.path / "old.txt")  # the run began anew
    run.log.write_text("five\n")
    assert process.stdout.readline() == "five\n"
    with run.log.open("a") as log:
        log.write("six\n")
    save(run, 1000)
    train(run, 1000)
    assert process.communicate(timeout=60) == ("six\n", None)
    assert process.returncode == 0


def test_following_goes_on_where_a_log_was_cut_off(run: RunDir):
    """As logrotate's copytruncate does."""
    process = follow(run, "-n", "1")
    assert process.stdout is not None
    assert process.stdout.readline() == "three\n"
    os.truncate(run.log, 0)
    with run.log.open("a") as log:
        log.write("new\n")
    assert process.stdout.readline() == "new\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0


def test_following_ends_where_the_run_was_moved_away(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name, seconds in (("_POLL_S", 0.05), ("_LOOK_S", 0.1), ("_GONE_S", 1.0)):
        monkeypatch.setattr(logs, name, seconds)
    follows, pass_on = threading.Event(), logs._pass_on
    monkeypatch.setattr(logs, "_pass_on", lambda file: (follows.set(), pass_on(file))[1])
    follower = threading.Thread(target=show_logs, args=(run.path, Wanted(), True, None), daemon=True)
    follower.start()
    assert follows.wait(20)
    moved = run.move_aside()
    time.sleep(0.2)
    moved.rename(run.path)  # a run that begins anew has a folder again at once
    time.sleep(1.2)
    assert follower.is_alive()
    run.move_aside()
    follower.join(20)
    assert not follower.is_alive()
    assert capsys.readouterr().err.endswith(f"{run.log} is gone\n")


def test_ctrl_c_ends_following(run: RunDir):
    process = follow(run)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(3)] == ["one\n", "two\n", "three\n"]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
