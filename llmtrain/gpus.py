"""The GPUs of this machine, counted without torch."""

import itertools
import os


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


def _num_named() -> int | None:
    """GPUs that CUDA_VISIBLE_DEVICES names, up to the first word that names none (-1, NoDevFiles), as CUDA reads it;
    None where it is not set."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return None
    return len(list(itertools.takewhile(_names_a_gpu, (name.strip() for name in names.split(",")))))


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
