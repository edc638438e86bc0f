"""A GPU that fails while a job trains: the job goes on, on other nodes."""

import signal
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pynvml
import pytest
import torch

from launcher.keeper import ranks as keeper_ranks
from launcher.keeper import torchrun
from launcher.keeper.meeting import Meeting, own_name
from launcher.keeper.ranks import Ranks
from launcher.keeper.rules import Rules
from launcher.keeper.supervisor import Supervisor
from launcher.keeper.torchrun import Start
from launcher.slurm import requeueing
from llmtrain import ledger
from llmtrain.errors import ConfigError
from llmtrain.rundir import RunDir
from llmtrain.world import find_world
from tests.support import nvml

driver = nvml.driver  # a fixture

FAILS = """
from llmtrain.errors import exit_with_code, own_code
own_code()
with exit_with_code():
    raise RuntimeError("CUDA error: {} encountered" + chr(10) + "CUDA kernel errors might be reported asynchronously")
"""
"""A rank alone, as torch words such errors."""
ECC = FAILS.format("uncorrectable ECC error")


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("script", "may_requeue", "goes_elsewhere"),
    [
        (ECC, True, True),
        (FAILS.format("unspecified launch failure"), True, True),
        (ECC, False, False),  # `llmtrain run`: there is nowhere else
        (FAILS.format("an illegal memory access was"), True, False),  # a bug of a kernel's, mostly
    ],
)
def test_a_job_is_queued_again_in_place_of_a_start_where_a_gpu_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, may_requeue: bool, goes_elsewhere: bool
):
    """Started again there, a rank would find no GPU of its own: that counts as an error of the configuration."""
    run, starts = RunDir(tmp_path / "run"), list[list[str]]()
    run.create()
    run.config.touch()

    def command(*_: object) -> list[str]:
        starts.append([sys.executable, "-c", script])
        return starts[-1]

    monkeypatch.setattr(torchrun, "command", command)
    monkeypatch.setattr(Supervisor, "_rest", lambda *_: None)
    rules = Rules(max_restarts=1, may_requeue=may_requeue)
    own = Supervisor(Start([], 1), run, rules, Meeting(tmp_path), tmp_path / "logs", tmp_path / "stop")
    assert own.supervise() == (75 if goes_elsewhere else 1)
    assert (len(starts), own.stopper.reason) == (1 if goes_elsewhere else 2, None)
    assert own.lost_gpus_on == ([own_name()] if goes_elsewhere else [])
    noted = ledger.events(run)[0]
    assert (noted.kind, "has failed" in noted.message) == ("restarted", goes_elsewhere)


@pytest.mark.parametrize(
    ("line", "is_lost"),
    [
        ("terminate called: CUDA error: unspecified launch failure", True),
        ("NVMLError_GpuIsLost: GPU is lost", True),
        ("GPU 0000:41:00.0: GPU has fallen off the bus.", True),
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", True),
        ("torch.AcceleratorError: CUDA error: device-side assert triggered", False),
        ("NCCL error: remote process exited or there was a network error", False),
        ("torch.OutOfMemoryError: CUDA out of memory", False),
    ],
)
def test_what_is_said_by_a_rank_that_could_leave_no_word(tmp_path: Path, line: str, is_lost: bool):
    """NCCL's watchdog aborts the process: what it wrote before stands in the rank's log alone."""
    (tmp_path / "codes").mkdir()
    log = tmp_path / "rank-1.log"
    log.write_text("CUDA error: uncorrectable ECC error encountered, in an earlier attempt\n")
    ranks = Ranks(0, tmp_path / "codes", tmp_path)
    assert not ranks.gpu_is_lost()
    with log.open("a") as file:
        file.write(f"[rank1]: {line}\nFatal Python error: Aborted\n" + "  File x\n" * 100)
    assert ranks.gpu_is_lost() == is_lost


@pytest.mark.parametrize(("excluded", "expected"), [("(null)", "n2,n5"), ("n[7-9]", "n[7-9],n2,n5")])
def test_nodes_that_are_kept_off_are_added_to_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, excluded: str, expected: str
):
    calls = tmp_path / "calls"
    (tmp_path / "scontrol").write_text(
        f'#!/bin/sh\necho "$@" >> {calls}\ncase "$*" in *show*) echo "JobId=7 ExcNodeList={excluded}";; esac\n'
    )
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    requeueing.avoid(["n2", "n5"], "7")
    assert calls.read_text().splitlines()[-1] == f"update JobId=7 ExcNodeList={expected}"


def test_a_cluster_that_does_not_let_us_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("PATH", str(tmp_path))
    requeueing.avoid(["n2"], "7")
    assert "it may start on n2 again: scontrol: not found" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("error", "lost", "promised", "cuda", "is_lost"),
    [
        (None, 1, "2", "12.8", "the driver shows 1 of 2"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, None, "2", "12.8", "the driver shows 0 of 2"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, None, "2", "12.8", "driver here does not work"),
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, None, "2", "12.8", None),
        (None, None, "2", "12.8", None),
        (None, 1, "2", None, None),
        (None, 1, "", "12.8", None),
    ],
    ids=[
        "one has failed", "no driver runs", "the driver does not work", "a container that was given none",
        "all are there: torch's build is too new", "torch for CPUs", "no job of SLURM's",
    ],
)  # fmt: skip
def test_a_first_start_without_a_gpu_that_slurm_has_promised(
    driver: types.SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    error: int | None,
    lost: int | None,
    promised: str,
    cuda: str | None,
    is_lost: str | None,
):
    driver.error, driver.lost = error, lost
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", promised)
    if is_lost is None:
        with pytest.raises(ConfigError, match="no such device here"):
            find_world("cuda", "my.yaml:3")
    else:
        with pytest.raises(
            RuntimeError, match=f"a GPU is lost: SLURM promised 2 on this node, and .*{is_lost}"
        ) as told:
            find_world("cuda", "my.yaml:3")
        assert keeper_ranks._LOST.search(str(told.value))


def test_one_gpu_of_several_that_has_failed_is_lost_too(driver: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    """torch counts those that answer: the last rank has none."""
    driver.lost = 1
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(RuntimeError, match="a GPU is lost"):
        find_world("cuda", "my.yaml:3")


def test_gpus_that_are_hidden_on_purpose_are_not_lost(driver: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    """On every node: another one would not have them either."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match="no such device here"):
        find_world("cuda", "my.yaml:3")
