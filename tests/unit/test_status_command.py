"""`llmtrain status`: what a run is doing, told from its folder alone."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.display import when
from launcher.jobs import JobDir
from launcher.runs import find_runs
from launcher.watching import status_display
from launcher.watching.status import read_checkpoints
from launcher.watching.status_display import show_status
from llmtrain import jsonl, ledger, ranking
from llmtrain.errors import RunFolderError
from llmtrain.ledger import Event, HubState, Status
from llmtrain.rundir import RunDir
from tests.support.checkpoint_runs import BATCH, TARGETS, make_run, save, score, stretches, train, upload
from tests.support.jobs import status_of
from tests.support.runs import environment

HERE = os.uname().nodename


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """500 of 1000 steps; 200 and 300 are scored, 200 is uploaded, 400 is new, 100 is in quarantine."""
    made = make_run(tmp_path / "runs" / "gpt", "hub.repo=ada/gpt", "train.steps=1000")
    for step in (100, 200, 300, 400):
        save(made, step, 3.5 - step / 1000)
    score(made, 200, stretches(0.001, noise=0.03, seed=2))
    score(made, 300, stretches(0.0, noise=0.03, seed=3))
    upload(made, 200)
    made.checkpoint(100).rename(made.quarantined(100))
    train(made, 500)
    return made


def told(run: RunDir, capsys: pytest.CaptureFixture[str]) -> str:
    """The block, with folded lines joined."""
    show_status([run.path], False, False)
    output = capsys.readouterr().out
    assert max(len(line) for line in output.splitlines() if not line.startswith("go on")) <= 80  # that is pasted
    assert "\x1b" not in output
    return " ".join(output.split())


def say(run: RunDir, pid: int = os.getpid(), host: str = HERE, **fields: Any) -> None:
    ledger.write(run.service_status, Status(pid=pid, host=host, **fields))


def test_a_damaged_record_names_itself_and_hides_no_other_run(run: RunDir, capsys: pytest.CaptureFixture[str]):
    damaged = make_run(run.path.with_name("damaged"), "service.start=never")
    jobs = JobDir.of(make_run(run.path.with_name("jobs"), "service.start=never"))
    for file in (damaged.events, jobs.ledger):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('{"kind": "started", "message": "", "step": 0, "time": 1.0}\n{"kind": "res\x00\n{}\n')
    status_display._print([run.path.parent], False, Console(width=400))
    shown = capsys.readouterr().out
    assert "unreadable" in shown
    assert f"{damaged.path}: {damaged.events}: line 2 is damaged" in " ".join(shown.split())
    assert f"{jobs.ledger}: line 2 is damaged" in shown
    assert "500/1,000" in shown
    for small in (run.service_status, run.hub_state, run.early_stop, run.origin):
        small.write_text("{")
    assert status_of(run).training.state == "stopped"
    assert "delete that line" in told(damaged, capsys)


# ---------------------------------------------------------------------------------------------- training


def test_a_stopped_run(run: RunDir, capsys: pytest.CaptureFixture[str]):
    found = status_of(run)
    training = found.training
    assert (training.state, training.step, training.total_steps, training.epoch) == ("stopped", 500, 1000, 16.0)
    assert (training.loss, training.heldout) == (3.5, (400, 3.1))
    assert (training.tokens_per_s, training.left_s, training.early_stop) == (None, None, None)
    assert found.checkpoints.on_disk == [200, 300, 400]
    assert (found.checkpoints.best, found.checkpoints.proposed) == (
        (300, pytest.approx(ledger.scores(run)[300].loss)),
        (200, pytest.approx(ledger.scores(run)[200].loss)),
    )
    assert (found.checkpoints.quarantined, found.checkpoints.not_scored) == ([100], [400])
    assert found.hub is not None
    assert (found.hub.confirmed, found.hub.waiting, found.hub.state) == ([200], [300, 400], None)
    text = told(run, capsys)
    assert "stopped, step 500 of 1,000 (50%), epoch 16.00" in text
    assert "loss 3.5000, held-out 3.1000 at step 400" in text
    assert "use step 200" in text
    assert "not running: step 400 not scored, steps 300 and 400 not uploaded" in text
    assert "ada/gpt: not contacted yet; 1 confirmed there, steps 300 and 400 waiting" in text
    assert "in quarantine" in text


def test_a_run_that_nobody_scores_has_a_checkpoint_to_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = make_run(tmp_path / "runs" / "gpt", "service.start=never", "train.steps=300")
    for step, loss in ((100, 3.5), (200, 3.0), (300, 3.2)):
        save(run, step, loss)
    train(run, 300)
    assert status_of(run).checkpoints.proposed == (200, 3.0)
    end = "use step 200 (3.0000, measured at the save); never scored from disk (service.start=never)"
    assert f"last step 300, 3 on disk; {end}" in told(run, capsys)


def test_a_running_run_and_its_pace(run: RunDir, capsys: pytest.CaptureFixture[str]):
    now = time.time()
    ledger.append(run.events, Event(kind="started", message="", step=0, time=now - 9000))
    ledger.append(run.events, Event(kind="resumed", message="", step=400, time=now - 200))
    os.utime(run.metrics, (now, now))
    assert status_of(run).training.tokens_per_s is None  # it does not run
    with run.lock():
        training = status_of(run).training
        assert training.state == "running"
        assert training.who == f"process {os.getpid()} on {HERE}"
        assert training.tokens_per_s == pytest.approx(0.5 * BATCH * TARGETS, rel=0.01)  # 100 steps in 200 s
        assert training.left_s == pytest.approx(1000, rel=0.01)
        assert "1,024 learned tokens/s on average since it was last started, about 16 min left" in told(run, capsys)
    assert status_of(run).training.state == "stopped"
    assert f"it was process {os.getpid()}" in told(run, capsys)


def test_what_the_last_start_failed_with_is_there_to_mend(run: RunDir, capsys: pytest.CaptureFixture[str]):
    failed = Event(kind="failed", message="exit code 20: step 3: loss nan", time=time.time() - 60)
    ledger.append(run.events, Event(kind="started", message="", step=0, time=time.time() - 90))
    ledger.append(run.events, failed)
    ledger.append(run.events, Event(kind="rejected", message="", step=9))
    assert f"training failed on {when(failed.time)}, exit code 20: step 3: loss nan" in told(run, capsys)
    with run.lock():
        assert "training failed" not in told(run, capsys)
    ledger.append(run.events, Event(kind="resumed", message="", step=2))
    assert "training failed" not in told(run, capsys)


def test_a_run_on_another_machine_counts_as_running_while_it_writes(run: RunDir):
    (run.path / "lock").write_text("process 12 on another-node")
    assert status_of(run).training.state == "running"
    os.utime(run.metrics, (time.time() - 3600, time.time() - 3600))
    assert status_of(run).training.state == "stopped"


def test_finished_ended_early_and_not_started(run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run.service.mkdir(exist_ok=True)
    run.early_stop.write_text('{"message": "no improvement for 3 saves", "saves": 3}')
    assert status_of(run).training.state == "ended early"
    assert "asked to end early: no improvement for 3 saves" in told(run, capsys)
    run.early_stop.unlink()
    train(run, 1000)
    assert status_of(run).training.state == "stopped"
    assert "mend its last step was not saved: start it again, and it goes on from step 400" in told(run, capsys)
    save(run, 1000)
    assert status_of(run).training.state == "finished"
    shutil.rmtree(run.checkpoint(1000))  # by the rule, once it was scored
    assert status_of(run).training.state == "stopped"
    run.summary.write_text('{"steps": 1000}')
    assert status_of(run).training.state == "finished"
    assert "not saved" not in told(run, capsys)
    fresh = make_run(tmp_path / "runs" / "fresh", "service.start=never")
    assert status_of(fresh).training.state == "not started"
    assert "checkpoints none yet service none (service.start=never)" in told(fresh, capsys)


def test_the_length_of_a_run_in_epochs_is_known_after_its_first_line(tmp_path: Path):
    run = make_run(tmp_path / "run", "train.epochs=2")
    assert status_of(run).training.total_steps is None
    train(run, 20)
    assert status_of(run).training.total_steps == 63  # 2 x 1000 rows / 32


def test_a_cut_line_and_a_large_ledger(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    assert jsonl.last_record(path) is None
    jsonl.append(path, [{"step": step, "text": "x" * 100} for step in range(3000)])
    with path.open("a") as file:
        file.write('{"step": 3000, "te')
    found = jsonl.last_record(path)
    assert found is not None
    assert found["step"] == 2999
    path.write_text('{"step": 0')
    assert jsonl.last_record(path) is None


# ---------------------------------------------------------------------------------------------- service, Hub


def test_a_service_at_work(run: RunDir, capsys: pytest.CaptureFixture[str]):
    lock = run.lock_service()
    assert lock is not None
    with lock:
        say(run, pid=1)
        assert status_of(run).service.status is None  # said by the one before
        assert "service starting" in told(run, capsys)
        say(
            run,
            doing=["scoring step 400", "uploading step 300 (attempt 3)"],
            to_score=[400],
            to_upload=[300, 400],
            next_try_s=40,
            last_error="upload of step 300: 503\nService \x1b[31mUnavailable",
        )
        assert status_of(run).service.at_work
        text = told(run, capsys)
        assert f"at work (process {os.getpid()} on {HERE}): scoring step 400 and uploading step 300 (attempt 3)" in text
        assert "1 to score (step 400), 2 to upload (steps 300 and 400)" in text
        assert "next try in " in text
        assert "upload of step 300: 503 Service \\x1b[31mUnavailable" in text
        assert "it has said nothing" not in text
        say(run, time=time.time() - 120)
        assert "nothing to do it has said nothing for 2 min" in told(run, capsys)
    assert "not running since" in told(run, capsys)


def test_a_service_on_another_machine_counts_while_it_speaks(run: RunDir):
    say(run, pid=1, host="another-node")
    assert status_of(run).service.at_work
    say(run, pid=1, host="another-node", time=time.time() - 600)
    assert not status_of(run).service.at_work
    say(run, pid=1, host=HERE)  # here the lock tells
    assert not status_of(run).service.at_work


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (HubState(state="ok", message="", repo="ada/gpt", private=True), "ada/gpt: private; 1 confirmed"),
        (HubState(state="ok", message="", repo="ada/gpt", private=False), "ada/gpt: PUBLIC; 1 confirmed"),
        (HubState(state="refused", message="401 no", repo="ada/gpt"), "ada/gpt: refused (401 no); 1 confirmed"),
        (HubState(state="unreachable", message="no route", repo="ada/gpt"), "unreachable (no route)"),
        (HubState(state="ok", message="", repo="ada/other", private=True), "ada/gpt: not contacted yet"),
    ],
)
def test_the_hub_as_read_back(run: RunDir, capsys: pytest.CaptureFixture[str], state: HubState, text: str):
    ledger.write(run.hub_state, state)
    assert text in told(run, capsys)


def test_an_upload_of_what_was_saved_here_before_does_not_count(run: RunDir):
    save(run, 200, content="saved again")
    hub = status_of(run).hub
    assert hub is not None
    assert hub.waiting == [200, 300, 400]


def test_an_upload_whose_tag_was_removed_is_neither_on_the_hub_nor_waiting(run: RunDir):
    upload(run, 200, removed=True)
    hub = status_of(run).hub
    assert hub is not None
    assert (hub.confirmed, hub.waiting) == ([], [300, 400])


def test_what_a_person_has_to_mend_is_said(run: RunDir, capsys: pytest.CaptureFixture[str]):
    say(run, problem="the token was refused; run 'hf auth login'")
    assert "mend the token was refused; run 'hf auth login'" in told(run, capsys)
    run.config.write_text("modle: {}\n")  # of another version: the rest is still shown
    found = status_of(run)
    assert any("modle" in problem for problem in found.problems)
    assert found.training.step == 500


# ---------------------------------------------------------------------------------------------- several runs


def test_several_runs_get_a_line_each(run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    make_run(run.path.parent / "other", "train.steps=20")
    say(run, problem="token refused")
    monkeypatch.chdir(run.path.parents[1])
    show_status([], False, False)
    output = capsys.readouterr().out
    lines = output.splitlines()
    assert lines[2].split()[:5] == ["runs/gpt", "stopped", "500/1,000", "3.1000", "200"]
    assert lines[3].split()[:4] == ["runs/other", "not", "started", "0/20"]
    assert "mend         runs/gpt: token refused" in output
    assert max(map(len, lines)) <= 80
    monkeypatch.setenv("COLUMNS", "150")
    show_status([Path("runs")], False, False)
    wide = capsys.readouterr().out
    assert all(name in wide.splitlines()[0] for name in ("epoch", "loss", "best", "Hub", "last line"))
    assert "1 up, 2 wait" in wide


def test_which_runs_are_meant(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    other = make_run(tmp_path / "elsewhere")
    runs = run.path.parent
    assert [found.path for found in find_runs([runs, run.path, other.path])] == [run.path, other.path]
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(RunFolderError, match="no run below it"):
        find_runs([])
    with pytest.raises(RunFolderError, match="no such folder"):
        find_runs([tmp_path / "nope"])


def test_json_holds_every_field(run: RunDir, capsys: pytest.CaptureFixture[str]):
    say(run, doing=["scoring step 400"])
    show_status([run.path], True, False)
    [found] = json.loads(capsys.readouterr().out)
    assert set(found) == {field.name for field in dataclasses.fields(status_of(run))}
    assert found["path"] == str(run.path)
    assert found["training"]["state"] == "stopped"
    assert found["checkpoints"]["not_scored"] == [400]
    assert found["service"]["status"]["doing"] == ["scoring step 400"]
    assert found["hub"]["repo"] == "ada/gpt"


def test_json_has_null_for_what_is_no_number(run: RunDir, capsys: pytest.CaptureFixture[str]):
    last = {"step": 501, "loss": float("nan"), "epoch": 16.0, "samples": 16_032, "targets": 9}
    jsonl.append(run.metrics, [last, {**last, "step": 502, "loss": float("-inf")}])
    for step in (502, 501):
        show_status([run.path], True, False)
        told = capsys.readouterr().out
        [found] = json.loads(told, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert (found["training"]["step"], found["training"]["loss"]) == (step, None)
        jsonl.rewind(run.metrics, 501)


def test_watching_reads_anew_and_ends_quietly(
    run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    turns: list[float] = []

    def sleep(seconds: float) -> None:
        turns.append(seconds)
        train(run, 500 + 10 * len(turns), every=500 + 10 * len(turns))
        if len(turns) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(status_display.time, "sleep", sleep)
    show_status([run.path], False, True)
    output = capsys.readouterr().out
    assert all(f"step {step} of 1,000" in output for step in (500, 510, 520))
    assert turns == [2.0, 2.0, 2.0]


def test_watching_keeps_one_ranking_of_a_run(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    """One is some MB after thousands of saves."""
    kept, rank = list[weakref.ref[ranking.Ranking]](), ranking.rank

    def noted(ranked: RunDir) -> ranking.Ranking | None:
        found = rank(ranked)
        assert found is not None
        kept.append(weakref.ref(found))
        return found

    monkeypatch.setattr(ranking, "rank", noted)
    for loss in (3.0, 2.9, 2.8):
        score(run, 400, loss)
        assert read_checkpoints(run) == read_checkpoints(run)
    assert [ranking() is not None for ranking in kept] == [False, False, True]


def test_ctrl_c_at_a_terminal_leaves_quietly(run: RunDir):
    """A pseudo-terminal, a real signal: exit code 0, no traceback, the cursor is shown again."""
    code = (
        "import pty, os, sys, time, signal, select\n"
        "pid, fd = pty.fork()\n"
        "if pid == 0:\n"
        "    from launcher.watching.status_display import show_status\n"
        "    from pathlib import Path\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        f"    show_status([Path({str(run.path)!r})], False, True)\n"
        "    os._exit(0)\n"
        "output, sent = b'', False\n"
        "while True:\n"
        "    try: piece = os.read(fd, 65536)\n"
        "    except OSError: break\n"
        "    if not piece: break\n"
        "    output += piece\n"
        "    if b'quarantine' in output and not sent:\n"
        "        sent = True; time.sleep(0.2); os.kill(pid, signal.SIGINT)\n"
        "sys.stdout.buffer.write(output)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment(), "TERM": "xterm", "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout
    assert "\x1b[?25h" in done.stdout
