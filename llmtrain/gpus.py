"""The GPUs of this machine, counted without torch."""

import os


def num_gpus() -> int:
    """NVIDIA GPUs that this process may use; 0 also where their driver is broken (`driver_problem`)."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip()])
    import pynvml

    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:
        return 0


def driver_problem() -> str | None:
    """What is wrong with the NVIDIA driver of this machine; None where it works, and where there is none."""
    if not os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip():  # they are hidden on purpose
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
