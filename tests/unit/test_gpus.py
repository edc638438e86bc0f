"""GPUs that are counted, and a driver that does not work: that is no machine without GPUs."""

import contextlib
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, cast

import pynvml
import pytest
import torch

from launcher.checks import doctor
from launcher.checks.environment import Environment, Torch
from launcher.keeper.torchrun import ranks_here
from launcher.planning.plan import Machine, find_machine, uses_bf16
from llmtrain import metrics
from llmtrain.batches import BatchPlan
from llmtrain.config import load_config
from llmtrain.devices import check_kernels
from llmtrain.errors import ConfigError
from llmtrain.gpus import all_gpus, driver_problem, find_driver, num_gpus
from llmtrain.hardware import peak_flops
from llmtrain.manifest import TrainState
from llmtrain.models.base import be_quiet
from llmtrain.progress import Progress
from llmtrain.rundir import RunDir
from llmtrain.strategies import zero2
from llmtrain.world import World, find_world
from tests.support import nvml
from tests.support.runs import environment

ROOT = Path(__file__).parents[2]
driver = nvml.driver  # a fixture


@pytest.mark.parametrize("error", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED])
def test_a_machine_without_a_driver_has_no_gpus(driver: types.SimpleNamespace, error: int):
    driver.error = error
    assert (num_gpus(), driver_problem(), ranks_here(None, None)) == (0, None, (1, None))
    assert [found.severity for found in doctor._examine_gpus(find_driver(), all_gpus())] == ["ok"]


def test_a_driver_that_does_not_work_is_an_error(driver: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    """After an update without a reboot: training would take the CPU in silence."""
    driver.error = pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
    for gpus in (None, 2):
        with pytest.raises(ConfigError, match=r"NVIDIA driver here does not work \(.*mismatch.*--gpus 0"):
            ranks_here(gpus, None)
    assert ranks_here(0, None) == (1, "cpu")
    assert ranks_here(None, 4) == (4, "cpu")
    (found,) = doctor._examine_gpus(find_driver(), all_gpus())
    assert (found.severity, "does not work" in found.message) == ("error", True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert ranks_here(None, None) == (1, None)


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        ("0,1", 2), (" 3 ", 1), ("GPU-8d1f2c3e,GPU-11", 2), ("MIG-1", 1), ("", 0), ("-1", 0), ("NoDevFiles", 0),
        ("none", 0), ("0,-1,1", 1), ("2,1,", 2),
    ],
)  # fmt: skip
def test_gpus_are_counted_as_cuda_counts_them(
    driver: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch, visible: str, gpus: int
):
    driver.error = pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert num_gpus() == gpus
    assert (driver_problem() is None) == (not gpus)


@pytest.mark.parametrize(
    ("visible", "machine"),
    [
        (None, (80e9, True)), ("1", (16e9, False)), ("GPU-t4", (16e9, False)), ("GPU-h100,GPU-t4", (80e9, True)),
        ("MIG-1", (10e9, None)), ("GPU-other", None), ("", None), ("-1,0", None), ("7", None),
    ],
)  # fmt: skip
def test_a_plan_asks_the_gpu_that_a_run_would_see(
    driver: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch, visible: str | None, machine: object
):
    gpus = {0: (80e9, (9, 0)), 1: (16e9, (7, 5)), "MIG-1": (10e9, None)}  # an H100, a T4, a part of an H100

    def known(gpu: Any) -> Any:
        if gpu not in gpus:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return gpu

    def capability(gpu: Any) -> tuple[int, int]:
        if (told := gpus[gpu][1]) is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return told

    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", known)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", known)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", lambda gpu: ("GPU-h100-0000", "GPU-t4-0000")[gpu])
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCudaComputeCapability", capability)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda gpu: types.SimpleNamespace(total=gpus[gpu][0]))
    found = find_machine(2, None, "auto")
    assert ((found.memory_bytes, found.bf16) if found.device == "cuda" else None) == machine
    if machine is None:
        with pytest.raises(ConfigError, match="no GPU on this machine to ask"):
            find_machine(2, None, "cuda")
    described = find_machine(2, 24.0, "auto")
    assert (described.device, described.memory_bytes, described.bf16) == ("cuda", 24e9, None)


def test_a_plan_counts_in_fp32_where_training_does():
    config, _ = load_config(None, [])
    machines = [Machine("cuda", 1, 16e9, "", bf16) for bf16 in (None, True, False)]
    assert [uses_bf16(config, machine) for machine in machines] == [True, True, False]


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A10", 125), ("NVIDIA A10G", 70), ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA RTX A1000", None), ("NVIDIA T400 4GB", None), ("NVIDIA A100X", None),
        ("Tesla T4", None), ("Tesla V100-SXM2-32GB", None),  # which compute in fp32
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)  # fmt: skip
def test_the_peak_of_a_gpu_is_known_by_its_whole_name(monkeypatch: pytest.MonkeyPatch, name: str, tflops: float | None):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda", 0)) == (tflops and tflops * 1e12)


@pytest.mark.parametrize("bf16", [True, False])
def test_a_run_in_fp32_is_not_measured_by_the_peak_of_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16: bool):
    monkeypatch.setattr(metrics, "peak_flops", lambda device: 1e12)
    shown: dict[str, float] = {}
    board = types.SimpleNamespace(scalars=lambda step, values, at=None: shown.update(values), flush=lambda: None)
    alone, plan = World(0, 1, 0, torch.device("cpu")), BatchPlan(8, 8, 1, 1)
    meter = metrics.Meter(
        RunDir(tmp_path), alone, cast(Any, board), Progress(1, 0, enabled=False), plan, 100, 8.0, 1.0, bf16
    )
    meter.observe(TrainState(step=1, samples=8, targets=64), 64, 0, 1e-3, torch.tensor(64.0), torch.tensor(1.0))
    meter.flush(0.0, at_once=True)
    assert ("speed/mfu" in shown, "speed/step_ms" in shown) == (bf16, True)


@pytest.mark.parametrize("visible", ["0,1", "GPU-8d1f2c3e-0000", "MIG-8d1f2c3e-0000"])
def test_deepspeed_finds_free_memory_where_gpus_have_names(monkeypatch: pytest.MonkeyPatch, visible: str):
    from deepspeed.accelerator import cuda_accelerator

    driver = types.SimpleNamespace(
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetMemoryInfo=lambda number: types.SimpleNamespace(free=7),
    )
    monkeypatch.setattr(cuda_accelerator, "pynvml", driver)
    accelerator = cuda_accelerator.CUDA_Accelerator()
    monkeypatch.setattr(accelerator, "current_device", lambda: 0)
    monkeypatch.setattr(accelerator, "total_memory", lambda *_: 9)
    monkeypatch.setattr(accelerator, "memory_allocated", lambda *_: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    zero2._ask_torch_for_free_memory()
    assert accelerator.available_memory() == (7 if visible == "0,1" else 8)


def test_the_doctor_survives_a_gpu_that_does_not_tell_all(driver: types.SimpleNamespace):
    assert ranks_here(None, None) == (2, "cuda")
    (found,) = doctor._examine_gpus(find_driver(), all_gpus())
    assert (found.severity, found.message[:18]) == ("ok", "2 x H100 with 80.0")
    driver.memory_error = pynvml.NVML_ERROR_NOT_SUPPORTED
    (found,) = doctor._examine_gpus(find_driver(), all_gpus())
    assert "2 x H100 with memory that it does not tell, fast bf16" in found.message
    driver.lost = 1
    well, lost = doctor._examine_gpus(find_driver(), all_gpus())
    assert well.message.startswith("1 x H100")
    assert (lost.severity, lost.message[:21]) == ("error", "GPU 1 does not answer")


@pytest.mark.parametrize(
    ("visible", "hidden", "severity"),
    [
        ("0,1", "", "ok"),
        ("1", "hides GPU 0 from runs", "ok"),
        ("GPU-a", "hides GPU 1 from runs", "ok"),
        ("MIG-b", "hides GPU 0 from runs", "ok"),
        ("", "hides all of them: runs take the CPU", "warning"),
    ],
)
def test_the_doctor_names_the_gpus_that_runs_would_not_see(
    driver: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch, visible: str, hidden: str, severity: str
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", lambda gpu: f"GPU-{'ab'[gpu]}123")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetIndex", lambda gpu: gpu)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", {"MIG-b": "a part"}.__getitem__)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetDeviceHandleFromMigDeviceHandle", {"a part": 1}.__getitem__)
    (found,) = doctor._examine_gpus(find_driver(), all_gpus())
    assert found.message.startswith("2 x H100 with 80.0 GB, fast bf16; driver 570.1 up to CUDA 12.8")
    assert (found.severity, found.message.partition("CUDA_VISIBLE_DEVICES ")[2]) == (severity, hidden)


def test_what_hidden_gpus_lack_is_no_error(driver: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    """Nobody would use them: that may be why they are hidden."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCudaComputeCapability", lambda gpu: ((9, 0), (6, 0))[gpu])
    here = Environment("3.11", Path("/venv"), Torch("2.13.0", "CUDA 13.0"), has_llmtrain=True)
    assert doctor._examine_kernels(here, all_gpus()) == []
    driver.lost = 1
    assert [found.severity for found in doctor._examine_gpus(find_driver(), all_gpus())] == ["ok", "warning"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    alone = Environment("3.11", Path("/venv"), Torch("2.13.0", None), has_llmtrain=True)
    monkeypatch.setattr(doctor, "look_into", lambda _: alone)
    assert [found.severity for found in doctor.examine() if found.what == "torch"] == ["ok"]  # runs take the CPU


@pytest.mark.parametrize(
    ("capability", "cuda", "instead"),
    [
        ((7, 0), "13.0", "CUDA 12.6"), ((6, 0), "12.9", "CUDA 12.6"), ((10, 0), "12.6", "a newer CUDA"),
        ((7, 0), "12.6", None), ((7, 5), "13.0", None), ((9, 0), "12.6", None), ((12, 0), "13.0", None),
    ],
)  # fmt: skip
def test_the_doctor_names_the_build_for_a_gpu_that_torch_has_no_code_for(
    driver: types.SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    cuda: str,
    instead: str | None,
):
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCudaComputeCapability", lambda _: capability)
    here = Environment("3.11", Path("/venv"), Torch("2.13.0", f"CUDA {cuda}"), has_llmtrain=True)
    monkeypatch.setattr(doctor, "look_into", lambda _: here)
    found = [each.message for each in doctor.examine() if "holds no code" in each.message and each.severity == "error"]
    assert len(found) == (instead is not None)
    for message in found:  # one for both GPUs
        assert f"H100 (compute capability {capability[0]}.{capability[1]}); install its build for {instead}" in message


def test_the_doctor_knows_what_torch_is_built_for(driver: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    """As torch itself has it; fails where a newer one is built for others."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    for cuda, built in torch.cuda.PYTORCH_RELEASES_CODE_CC.items():
        here = Environment("3.11", Path("/venv"), Torch("2.13.0", f"CUDA {cuda}"), has_llmtrain=True)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda built=built: [f"sm_{n}" for n in built["x86_64"]])
        for number in (50, 60, 61, 70, 75, 80, 86, 89, 90, 100, 103, 120, 121):
            capability = number // 10, number % 10
            monkeypatch.setattr(pynvml, "nvmlDeviceGetCudaComputeCapability", lambda _, given=capability: given)
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, given=capability: given)
            with pytest.raises(ConfigError) if doctor._examine_kernels(here, all_gpus()) else contextlib.nullcontext():
                check_kernels(torch.device("cuda", 0), "train.device=cuda")


def test_tasks_that_srun_started_without_a_launcher_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="srun started 2 tasks that know nothing of each other"):
        find_world("cpu", "default")
    monkeypatch.setenv("RANK", "0")
    assert find_world("cpu", "default").size == 1


def test_a_run_on_the_cpu_keeps_deepspeed_off_the_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    find_world("cpu", "default")
    be_quiet()  # before peft, which imports DeepSpeed
    assert os.environ["DS_ACCELERATOR"] == "cpu"


SEES = """
import os, subprocess, sys
import pytest, torch
from llmtrain.gpus import num_gpus
from tests.support.runs import environment
from tests.support.service_runs import surroundings

torch.cuda.is_available = lambda: num_gpus() > 0  # as with torch's build for CUDA
COUNT = [sys.executable, "-c", "from llmtrain.gpus import num_gpus; raise SystemExit(10 + num_gpus())"]

@pytest.fixture(scope="session")
def early():
    return num_gpus()

def test_on_the_cpu(early):
    assert (early, num_gpus(), torch.cuda.is_available()) == (0, 0, False)
    for env in (None, environment(), surroundings()):
        assert subprocess.run(COUNT, env=env).returncode == 10

@pytest.mark.gpu
def test_on_the_gpu(early):
    assert (early, num_gpus(), torch.cuda.is_available()) == (2, 2, True)
    for env in (environment(), surroundings()):
        assert subprocess.run(COUNT, env=env).returncode == 10
"""


@pytest.mark.parametrize(
    ("option", "visible", "told"),
    [
        ([], "0,1", "1 passed, 1 skipped"),
        (["--gpu"], "0,1", "1 passed, 1 deselected"),
        (["--gpu"], "", "1 skipped, 1 d"),
    ],
)
def test_tests_see_no_gpu_but_those_for_it(tmp_path: Path, option: list[str], visible: str, told: str):
    """On a machine with one GPU, two ranks of a test would meet on it."""
    (tmp_path / "test_sees.py").write_text(SEES)
    pytest_here = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*pytest_here, "-c", str(ROOT / "pyproject.toml"), *option, str(tmp_path)],
        cwd=ROOT, env={**environment(), "CUDA_VISIBLE_DEVICES": visible}, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert (done.returncode, told in done.stdout) == (0, True), done.stdout + done.stderr
