"""The GPUs of this machine, as NVIDIA's driver tells (NVML): asked without torch, and here alone."""

import contextlib
import itertools
import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GPU:
    """One of this machine's, whether this process may use it or not."""

    number: int
    """NVML's."""
    is_hidden: bool
    """CUDA_VISIBLE_DEVICES names others: this process, and what it starts, does not see it."""
    problem: str | None = None
    """Why it does not answer, such as one that has fallen off the bus; what follows is not known then."""
    name: str = ""
    capability: tuple[int, int] = (0, 0)
    """For which machine code is built."""
    memory_bytes: float | None = None
    """None where it does not tell, since it shares the machine's, as on Grace-Blackwell desktops."""


@dataclass(frozen=True)
class Driver:
    version: str
    cuda: tuple[int, int]
    """The newest CUDA that it can run."""


def num_gpus() -> int:
    """NVIDIA GPUs that this process may use; 0 also where their driver is broken (`driver_problem`)."""
    if (names := _named()) is not None:
        return len(names)
    import pynvml

    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:
        return 0


def find_driver() -> Driver | None:
    """None without one that works (`driver_problem`)."""
    import pynvml

    try:
        pynvml.nvmlInit()
        cuda = int(pynvml.nvmlSystemGetCudaDriverVersion())
        return Driver(pynvml.nvmlSystemGetDriverVersion(), (cuda // 1000, cuda % 1000 // 10))
    except pynvml.NVMLError:
        return None


def driver_problem() -> str | None:
    """What is wrong with the NVIDIA driver of this machine; None where it works, and where there is none."""
    if _named() == [] or (error := _failure()) is None:  # they are hidden on purpose, or all is well
        return None
    import pynvml

    # No library, or no driver that runs: the usual machine without a GPU.
    none = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    return None if getattr(error, "value", None) in none else f"the NVIDIA driver here does not work ({error})"


def missing(promised: int) -> str | None:
    """How the driver shows that this machine lacks some of the GPUs that this process was promised; None where it shows
    them all, and where it does not tell (no library of it here, parts of GPUs, GPUs that are hidden on purpose)."""
    if (problem := driver_problem()) is not None:
        return problem
    import pynvml

    if (names := _named()) is not None and (not names or any(name.startswith("MIG-") for name in names)):
        return None
    if getattr(_failure(), "value", None) == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        return None
    answer = sum(not gpu.is_hidden and gpu.problem is None for gpu in all_gpus())
    return f"the driver shows {answer} of {promised}" if answer < promised else None


def _failure() -> Exception | None:
    """What NVML answers in place of how many GPUs there are."""
    import pynvml

    try:
        pynvml.nvmlInit()
        pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError as error:
        return error
    return None


def all_gpus() -> list[GPU]:
    """Those that are hidden from this process too; none where the driver does not work (`driver_problem`)."""
    import pynvml

    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:
        return []
    names = _named()
    shown = range(count) if names is None else [_number_of(name) for name in names]
    found: list[GPU] = []
    for number in range(count):
        is_hidden = number not in shown
        try:
            gpu = pynvml.nvmlDeviceGetHandleByIndex(number)
            name = pynvml.nvmlDeviceGetName(gpu)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(gpu)
        except pynvml.NVMLError as error:
            found.append(GPU(number, is_hidden, problem=str(error)))
            continue
        memory = None
        with contextlib.suppress(pynvml.NVMLError):
            memory = float(pynvml.nvmlDeviceGetMemoryInfo(gpu).total)
        found.append(GPU(number, is_hidden, None, name, (major, minor), memory))
    return found


def first_gpu() -> tuple[float, bool | None] | None:
    """Memory in bytes of the first GPU that this process may use, and whether it computes in bf16 (None where part of a
    GPU does not tell); None where there is none."""
    import pynvml

    try:
        gpu = _handle(0)
        size = float(pynvml.nvmlDeviceGetMemoryInfo(gpu).total)
    except pynvml.NVMLError:
        return None
    try:
        return size, has_bf16(pynvml.nvmlDeviceGetCudaComputeCapability(gpu))
    except pynvml.NVMLError:
        return size, None


def has_bf16(capability: tuple[int, int]) -> bool:
    """Whether such a GPU computes in bf16: those before Ampere only emulate it."""
    return capability[0] >= 8


def memory_used(number: int) -> float | None:
    """Bytes in use on cuda:`number`, by whatever process, without what the driver keeps for itself (half a GB and more
    on large GPUs); None where nobody tells."""
    import pynvml

    try:
        gpu = _handle(number)
        try:
            return float(pynvml.nvmlDeviceGetMemoryInfo(gpu, version=pynvml.nvmlMemory_v2).used)
        except pynvml.NVMLError:  # a driver from before there was this
            return float(pynvml.nvmlDeviceGetMemoryInfo(gpu).used)
    except pynvml.NVMLError:
        return None


def find_by_uuid(uuid: str) -> Any | None:
    """For `readings`; None in a container without the driver's monitoring library."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError:
        return None


def readings(gpu: Any) -> dict[str, float]:
    """`utilisation_percent` and `power_w`, as far as it has readings of its own (part of a GPU, MIG, has none)."""
    import pynvml

    found: dict[str, float] = {}
    with contextlib.suppress(pynvml.NVMLError):
        found["utilisation_percent"] = float(pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu)
        found["power_w"] = pynvml.nvmlDeviceGetPowerUsage(gpu) / 1e3
    return found


def _handle(number: int) -> Any:
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
    return _handle_of(names[number])


def _handle_of(name: str) -> Any:
    """Of a GPU as CUDA_VISIBLE_DEVICES may name it."""
    import pynvml

    if name.isdecimal():
        return pynvml.nvmlDeviceGetHandleByIndex(int(name))
    if name.startswith("MIG-"):
        return pynvml.nvmlDeviceGetHandleByUUID(name)
    for index in range(pynvml.nvmlDeviceGetCount()):  # CUDA takes the beginning of a UUID too, NVML does not
        found = pynvml.nvmlDeviceGetHandleByIndex(index)
        if pynvml.nvmlDeviceGetUUID(found).startswith(name):
            return found
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)


def _number_of(name: str) -> int | None:
    """NVML's number of a GPU that is named so, or of the one that a part is of; None where there is none."""
    if name.isdecimal():
        return int(name)
    import pynvml

    with contextlib.suppress(pynvml.NVMLError):
        found = _handle_of(name)
        if name.startswith("MIG-"):
            found = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(found)
        return pynvml.nvmlDeviceGetIndex(found)
    return None


def _named() -> list[str] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES names, up to the first word that names none (-1, NoDevFiles), as CUDA reads
    it; None where it is not set."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return None
    return list(itertools.takewhile(_names_a_gpu, (name.strip() for name in names.split(","))))


def _names_a_gpu(name: str) -> bool:
    return name.isdecimal() or name.startswith(("GPU-", "MIG-"))
