"""Devices by name: what a person or a setting asks for -> one that is on this machine."""

import os
import re

import torch

from llmtrain.errors import ConfigError


def find(name: str, what: str) -> torch.device:
    """The device of that name: auto (a GPU if there is one, else Apple's MPS, else the CPU), cpu, mps, cuda or cuda:1.

    Args:
        what: what asked for it, for the error: "--device=gpu", or "service.score=cuda (my.yaml:4)".

    Raises:
        ConfigError: there is no such name, or no such device here.
    """
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,4})?", name):
        raise ConfigError([f"{what}: no device has that name; use auto, cpu, mps, cuda, or one GPU of several: cuda:1"])
    is_there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [kind for kind, found in is_there.items() if found]
    kind, _, number = (there[0] if name == "auto" else name).partition(":")
    if kind not in there:
        raise ConfigError([f"{what}: no such device here; use auto or one of: {', '.join(there)}"])
    if number and int(number) >= torch.cuda.device_count():
        gpus = ", ".join(f"cuda:{each}" for each in range(torch.cuda.device_count()))
        raise ConfigError([f"{what}: no such GPU here; GPUs are counted from 0, there are: {gpus}"])
    return torch.device(kind, int(number)) if number else torch.device(kind)


def check_kernels(device: torch.device, what: str) -> None:
    """Raises ConfigError for a GPU that this build of torch holds no code for: its first kernel would fail."""
    built = torch.cuda.get_arch_list() if device.type == "cuda" else []  # empty where torch does not tell
    if not built:
        return
    capability = torch.cuda.get_device_capability(device)
    if not any(_runs_on(architecture, capability) for architecture in built):
        wanted = "for CUDA 12.6" if capability < (7, 5) else "for a newer CUDA"
        raise ConfigError(
            [
                f"{what}: torch {torch.__version__} holds no code for {torch.cuda.get_device_name(device)} (compute "
                f"capability {capability[0]}.{capability[1]}); install its build {wanted} (docs/dependencies.md, "
                f'"Another build of torch"), or set {what.partition("=")[0]}=cpu'
            ]
        )


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for sm_80, sm_90a or compute_90 runs on a GPU of that compute capability."""
    found = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", architecture)
    if found is None:
        return True  # a kind that is not known here: torch finds out
    compiled_for = int(found[2]), int(found[3])
    # Machine code goes with its generation; what the driver still compiles (PTX) also with later ones.
    return capability >= compiled_for and (found[1] == "compute" or capability[0] == compiled_for[0])


def take(name: str, what: str) -> torch.device:
    """The same, as what this process computes on from now on."""
    device = find(name, what)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        check_kernels(device, what)
        torch.cuda.set_device(device)  # kernels that are not torch's own start on the current one
    keep_deepspeed_on(device)
    return device


def keep_deepspeed_on(device: torch.device) -> None:
    """DeepSpeed takes a GPU wherever there is one, as soon as anything imports it (peft does)."""
    os.environ["DS_ACCELERATOR"] = "cuda" if device.type == "cuda" else "cpu"
