"""The GPUs of this machine, counted without torch."""

import itertools
import os
from typing import Any


def num_gpus() -> int:
    """NVIDIA GPUs that this process may use; 0 also where their driver is broken (`driver_problem`)."""
    if (named := _num_named()) is not None:
        return named
    import pynvml

    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:
        return 0


def handle(number: int) -> Any:
    """NVML's handle of the GPU that this process calls cuda:`number` (where those of a machine are alike: CUDA may put
    the fastest first, NVML goes by their places).

    Raises:
        pynvml.NVMLError: there is none, or it does not answer.
    """
    import pynvml

    pynvml.nvmlInit()
    names = _named()
    if names is None:
        return pynvml.nvmlDeviceGetHandleByIndex(number)
    if number >= len(names):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
    name = names[number]
    if name.isdecimal():
        return pynvml.nvmlDeviceGetHandleByIndex(int(name))
    if name.startswith("MIG-"):
        return pynvml.nvmlDeviceGetHandleByUUID(name)
    for index in range(pynvml.nvmlDeviceGetCount()):  # CUDA takes the beginning of a UUID too, NVML does not
        found = pynvml.nvmlDeviceGetHandleByIndex(index)
        if pynvml.nvmlDeviceGetUUID(found).startswith(name):
            return found
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)


def memory_used(number: int) -> float | None:
    """Bytes in use on cuda:`number`, by whatever process, without what the driver keeps for itself (half a GB and more
    on large GPUs); None where nobody tells."""
    import pynvml

    try:
        gpu = handle(number)
        try:
            return float(pynvml.nvmlDeviceGetMemoryInfo(gpu, version=pynvml.nvmlMemory_v2).used)
        except pynvml.NVMLError:  # a driver from before there was this
            return float(pynvml.nvmlDeviceGetMemoryInfo(gpu).used)
    except pynvml.NVMLError:
        return None


def _num_named() -> int | None:
    names = _named()
    return None if names is None else len(names)


def _named() -> list[str] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES names, up to the first word that names none (-1, NoDevFiles), as CUDA reads
    it; None where it is not set."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return None
    return list(itertools.takewhile(_names_a_gpu, (name.strip() for name in names.split(","))))


def _names_a_gpu(name: str) -> bool:
    return name.isdecimal() or name.startswith(("GPU-", "MIG-"))


def driver_problem() -> str | None:
    """What is wrong with the NVIDIA driver of this machine; None where it works, and where there is none."""
    if _num_named() == 0:  # they are hidden on purpose
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError as error:
        # No library, or no driver that runs: the usual machine without a GPU.
        none = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
        if getattr(error, "value", None) in none:
            return None
        return f"the NVIDIA driver here does not work ({error})"
    return None
