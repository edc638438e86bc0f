"""`llmtrain run`: one machine, with torchrun underneath where there are several ranks."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from launcher.keeper import torchrun
from launcher.keeper.exit_codes import folders_of_ranks, read_codes, verdict
from launcher.keeper.one_machine import train_here
from launcher.keeper.rules import Rules
from launcher.keeper.torchrun import Start, command, ranks_here
from llmtrain import errors, ledger
from llmtrain.rundir import RunDir
from tests.support.runs import TIMEOUT_S, Workplace, environment
from tests.support.service_runs import wait_until

LENGTH = ["train.steps=200", "checkpoint.every_steps=10", "evaluate.every_steps=null", "evaluate.sample.tokens=1"]


def start(workplace: Workplace, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "launcher", "run", str(workplace.config), *words],
        cwd=workplace.folder,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def wait_for_checkpoint(run: Path, beyond: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not any(int(p.name[5:]) > beyond for p in (run / "checkpoints").glob("step-*")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    agent = psutil.Process(process.pid).children()[0]
    return agent.children()


def test_a_killed_rank_and_a_killed_agent_cost_nothing_but_time(workplace: Workplace):
    workplace.train("run.name=undisturbed-2", *LENGTH, ranks=2)
    process = start(workplace, "run.name=supervised", "--ranks", "2", *LENGTH)
    run = workplace.run_folder("supervised")
    wait_for_checkpoint(run, 0, process)
    ranks_of(process)[1].kill()
    newest = max(int(p.name[5:]) for p in (run / "checkpoints").glob("step-*"))
    wait_for_checkpoint(run, newest + 10, process)
    orphans = ranks_of(process)
    psutil.Process(process.pid).children()[0].kill()  # torchrun's agent: its ranks would train on without a keeper
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output
    assert output.count("starting again from step") == 2
    assert not any(orphan.is_running() for orphan in orphans)
    assert workplace.weights("supervised") == workplace.weights("undisturbed-2")
    assert workplace.ledger("supervised") == workplace.ledger("undisturbed-2")


def test_the_service_outlives_what_keeps_training(workplace: Workplace):
    """It must not take itself for a rank, whose exit code somebody waits for."""
    words = ["run.name=outlived", "train.steps=8", "service.start=auto", "service.wait_s=0"]
    output, _ = start(workplace, *words).communicate(timeout=TIMEOUT_S)
    run = RunDir(workplace.run_folder("outlived"))
    wait_until(lambda: sorted(ledger.scores(run)) == [4, 8], TIMEOUT_S)
    wait_until(lambda: not run.is_served(), TIMEOUT_S)
    assert run.checkpoint_steps() == [4, 8], output
    assert not [event for event in ledger.events(run) if event.kind == "score-failed"]
    assert "Traceback" not in run.service_log.read_text()


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_saves_once_and_says_go_on(workplace: Workplace, ranks: int):
    name = f"interrupted-{ranks}"
    words = [f"run.name={name}", "--ranks", str(ranks), *LENGTH, "train.steps=100000", "checkpoint.every_steps=50"]
    process = start(workplace, *words)
    wait_for_checkpoint(workplace.run_folder(name), 0, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == errors.EXIT_REQUEUE, output
    assert "stopped by SIGINT at step" in output
    assert "Traceback" not in output
    assert "ChildFailedError" not in output


def test_a_second_ctrl_c_leaves_at_once(workplace: Workplace):
    words = ["run.name=impatient-run", "--ranks", "2", *LENGTH, "train.steps=100000"]
    process = start(workplace, *words)
    wait_for_checkpoint(workplace.run_folder("impatient-run"), 0, process)
    ranks = ranks_of(process)
    for rank in ranks:
        rank.suspend()  # so that they cannot save and leave before the second one
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert any("SIGINT: the run saves and stops" in line for line in process.stdout)  # it has heard the first one
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)


def test_an_error_that_a_person_has_to_mend_is_not_repeated(workplace: Workplace, own_workplace: Workplace):
    process = start(workplace, "run.name=wrong", "model.num_heads=7")
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, "starting again" in output) == (2, False), output
    own_workplace.train("run.name=other", "train.steps=2")
    process = start(own_workplace, "run.name=other", "--ranks", "2", "optim.lr=1e-5")
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, "starting again" in output) == (errors.RunFolderError.exit_code, False), output


def test_a_run_that_comes_no_further_is_given_up(workplace: Workplace, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(workplace.folder)
    monkeypatch.setattr(torchrun, "command", lambda *_: [sys.executable, "-c", "import os; os.abort()"])
    monkeypatch.setattr(time, "sleep", lambda _: None)
    words = [str(workplace.config), "run.name=hopeless"]
    assert train_here(Start(words, 1), Rules(max_restarts=2)) == 1
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


FILLS = """
with open({file!r}, "wb", 0) as file:
    try:
        while file.write(bytes(4096)): pass
    except OSError: pass
"""


def test_temporary_files_that_fill_the_disk_end_nothing(
    workplace: Workplace, small_disk: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(workplace.folder)
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    scripts = iter([FILLS.format(file=str(small_disk / "full")) + "import os; os.abort()", ""])
    monkeypatch.setattr(torchrun, "command", lambda *_: [sys.executable, "-c", next(scripts)])
    words = [str(workplace.config), "run.name=no-room"]
    try:
        assert train_here(Start(words, 1), Rules()) == 0
    finally:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with folders_of_ranks(tmp_path / "beside") as (codes, beats):
        assert codes.is_relative_to(tmp_path / "beside")
        assert beats.is_dir()
    assert not list((tmp_path / "beside").iterdir())


@pytest.mark.parametrize(("error", "code"), [("ShardError('altered')", 13), ("ValueError('a bad row')", 1)])
def test_a_full_disk_has_room_for_an_exit_code(small_disk: Path, error: str, code: int):
    with contextlib.suppress(OSError), (small_disk / "full").open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    (small_disk / "codes").mkdir()
    leaves = "from llmtrain.errors import *\nown_code()\nwith exit_with_code(): raise "
    told = {**environment(), errors.EXIT_CODES: str(small_disk / "codes")}
    done = subprocess.run([sys.executable, "-c", leaves + error], env=told, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.splitlines()[-1] in ("error: altered", "ValueError: a bad row")
    assert [left.code for left in read_codes(small_disk / "codes").values()] == [code]


@pytest.mark.parametrize(
    ("agents", "codes", "ranks", "told"),
    [
        (0, [0, 0], 2, 0),
        (0, [75, 75], 2, 75),
        (1, [1, 19], 2, 19),
        (1, [], 2, 1),
        (1, [75, 75], 2, 75),
        (1, [75], 2, 1),
        (-9, [], 2, -9),
    ],
)
def test_what_a_run_came_to(agents: int, codes: list[int], ranks: int, told: int):
    assert verdict([agents], codes, ranks) == told


@pytest.mark.parametrize(
    ("ranks", "given", "threads"),
    [
        (4, {}, "2"),
        (16, {}, "1"),
        (2, {"SLURM_CPUS_ON_NODE": "6"}, "3"),
        (4, {"OMP_NUM_THREADS": "5"}, "5"),
        (1, {}, None),
    ],
)
def test_the_ranks_of_a_node_share_its_cores(
    monkeypatch: pytest.MonkeyPatch, ranks: int, given: dict[str, str], threads: str | None
):
    """torchrun would leave each of them one thread."""
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    started = torchrun.environment(Start(["a.yaml"], ranks), restarted=False, further={})
    assert started.get("OMP_NUM_THREADS") == threads


def test_where_it_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torchrun, "num_gpus", lambda: 2)
    assert ranks_here(None, None) == (2, "cuda")
    assert ranks_here(0, None) == (1, "cpu")
    assert ranks_here(0, 4) == (4, "cpu")
    assert ranks_here(None, 4) == (4, "cpu")
    with pytest.raises(errors.ConfigError, match="this machine shows 2"):
        ranks_here(3, None)
    with pytest.raises(errors.ConfigError, match="--ranks is for the CPU"):
        ranks_here(2, 2)
    monkeypatch.setattr(torchrun, "num_gpus", lambda: 0)
    assert ranks_here(None, None) == (1, None)
    # A Mac's GPU is not counted: where the CPU is asked for, "auto" would take it.
    assert ranks_here(0, None) == (1, "cpu")
    assert ranks_here(None, 2) == (2, "cpu")

    def words(ranks: int, device: str | None) -> list[str]:
        return command(Start(["a.yaml"], ranks, device), None, False, Path("scratch"))

    assert "train.device=cpu" in words(*ranks_here(0, None))
    assert not any("train.device" in word for word in words(*ranks_here(None, None)))
    assert "torch.distributed.run" not in words(1, None)
    assert os.path.basename(sys.executable) in words(2, None)[0]  # noqa: PTH119
