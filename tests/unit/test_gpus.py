"""GPUs that are counted, and a driver that does not work: that is no machine without GPUs."""

import os
import types

import pynvml
import pytest
import torch

from launcher.checks import doctor
from launcher.keeper.torchrun import check
from llmtrain.errors import ConfigError
from llmtrain.gpus import driver_problem, num_gpus
from llmtrain.hardware import peak_flops
from llmtrain.models.base import be_quiet
from llmtrain.strategies import zero2
from llmtrain.world import find_world


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """One that answers with an error, or with two GPUs."""
    told = types.SimpleNamespace(error=None, memory_error=None, lost=None)

    def answer(value: object) -> object:
        if told.error is not None:
            raise pynvml.NVMLError(told.error)
        return value

    def handle(number: int) -> int:
        if number == told.lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return number

    def memory(_: int) -> object:
        if told.memory_error is not None:
            raise pynvml.NVMLError(told.memory_error)
        return types.SimpleNamespace(total=80e9)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: answer(None))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: answer(2))
    monkeypatch.setattr(pynvml, "nvmlSystemGetCudaDriverVersion", lambda: answer(12080))
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "570.1")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", handle)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCudaComputeCapability", lambda _: (9, 0))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda _: "H100")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", memory)
    return told


@pytest.mark.parametrize("error", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED])
def test_a_machine_without_a_driver_has_no_gpus(driver: types.SimpleNamespace, error: int):
    driver.error = error
    assert (num_gpus(), driver_problem(), check(None, None)) == (0, None, (1, None))
    assert [found.severity for found in doctor._examine_gpus(doctor._driver_cuda())] == ["ok"]


def test_a_driver_that_does_not_work_is_an_error(driver: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    """After an update without a reboot: training would take the CPU in silence."""
    driver.error = pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
    for gpus in (None, 2):
        with pytest.raises(ConfigError, match=r"NVIDIA driver here does not work \(.*mismatch.*--gpus 0"):
            check(gpus, None)
    assert check(0, None) == (1, "cpu")
    assert check(None, 4) == (4, "cpu")
    (found,) = doctor._examine_gpus(doctor._driver_cuda())
    assert (found.severity, "does not work" in found.message) == ("error", True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert check(None, None) == (1, None)


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
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A10", 125), ("NVIDIA A10G", 70), ("Tesla T4", 65),
        ("NVIDIA RTX A1000", None), ("NVIDIA T400 4GB", None), ("NVIDIA A100X", None),
    ],
)  # fmt: skip
def test_the_peak_of_a_gpu_is_known_by_its_whole_name(monkeypatch: pytest.MonkeyPatch, name: str, tflops: float | None):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda", 0)) == (tflops and tflops * 1e12)


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
    assert check(None, None) == (2, "cuda")
    (found,) = doctor._examine_gpus(doctor._driver_cuda())
    assert (found.severity, found.message[:18]) == ("ok", "2 x H100 with 80.0")
    driver.memory_error = pynvml.NVML_ERROR_NOT_SUPPORTED
    (found,) = doctor._examine_gpus(doctor._driver_cuda())
    assert "2 x H100 with memory that it does not tell, fast bf16" in found.message
    driver.lost = 1
    well, lost = doctor._examine_gpus(doctor._driver_cuda())
    assert well.message.startswith("1 x H100")
    assert (lost.severity, lost.message[:21]) == ("error", "GPU 1 does not answer")


def test_a_run_on_the_cpu_keeps_deepspeed_off_the_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    find_world("cpu")
    be_quiet()  # before peft, which imports DeepSpeed
    assert os.environ["DS_ACCELERATOR"] == "cpu"
