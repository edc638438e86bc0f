"""What the machine is doing: memory, and on NVIDIA GPUs utilisation, power and peak arithmetic."""

import re

import psutil
import torch

from llmtrain import cpu, gpus

_PEAK_BF16_TFLOPS = {  # dense, from NVIDIA's data sheets; of several that fit a name the first
    "B200": 2250.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
    "A10": 125.0,
    "A10G": 70.0,
}
_SLOWER = r"\b(MIG|D|Laptop|Max-Q)\b"
"""Words in the name of a part of a GPU (MIG), and of those that share another one's name with fewer units."""


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a GPU that is known by name; None for others, and for those that emulate bf16."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if re.search(_SLOWER, name):
        return None
    # Whole words: an RTX A1000 is no A100, an A10G no A10.
    known = [tflops for words, tflops in _PEAK_BF16_TFLOPS.items() if re.search(rf"\b{words}\b", name)]
    return known[0] * 1e12 if known else None


def is_bf16_fast(device: torch.device) -> bool:
    """Whether bf16 arithmetic is done by the hardware rather than emulated, and faster than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return cpu.has_fast_bf16()
    return False


class HardwareMeter:
    """Readings for TensorBoard; each takes well under a millisecond and never waits for the GPU's queue."""

    def __init__(self, device: torch.device):
        self._device = device
        self._process = psutil.Process()
        self._gpu = None
        if device.type == "cuda":
            self._gpu = gpus.find_by_uuid(torch.cuda.get_device_properties(device).uuid)

    def read(self) -> dict[str, float]:
        values = {"hardware/memory_gb": self._process.memory_info().rss / 1e9}
        if self._device.type == "cuda":
            values["hardware/gpu_memory_peak_gb"] = torch.cuda.max_memory_allocated(self._device) / 1e9
        if self._gpu is not None:
            values |= {f"hardware/gpu_{name}": value for name, value in gpus.readings(self._gpu).items()}
        return values
