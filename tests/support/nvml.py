"""NVIDIA's driver, pretended: what NVML says of two GPUs."""

import types

import pynvml
import pytest


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
