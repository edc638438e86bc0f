"""Devices by name: what a person or a setting asks for -> one that is on this machine."""

import os
import re

import torch

from llmtrain.errors import ConfigError


def find(name: str, told: str) -> torch.device:
    """The device of that name: auto (a GPU if there is one, else Apple's MPS, else the CPU), cpu, mps, cuda or cuda:1.

    Args:
        told: what asked for it, for the error: "--device=gpu", or "service.score=cuda (my.yaml:4)".

    Raises:
        ConfigError: there is no such name, or no such device here.
    """
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,4})?", name):
        raise ConfigError([f"{told}: no device has that name; use auto, cpu, mps, cuda, or one GPU of several: cuda:1"])
    is_there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [kind for kind, found in is_there.items() if found]
    kind, _, number = (there[0] if name == "auto" else name).partition(":")
    if kind not in there:
        raise ConfigError([f"{told}: no such device here; use auto or one of: {', '.join(there)}"])
    if number and int(number) >= torch.cuda.device_count():
        gpus = ", ".join(f"cuda:{each}" for each in range(torch.cuda.device_count()))
        raise ConfigError([f"{told}: no such GPU here; GPUs are counted from 0, there are: {gpus}"])
    return torch.device(kind, int(number)) if number else torch.device(kind)


def take(name: str, told: str) -> torch.device:
    """The same, as what this process computes on from now on."""
    device = find(name, told)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)  # kernels that are not torch's own start on the current one
    keep_deepspeed_on(device)
    return device


def keep_deepspeed_on(device: torch.device) -> None:
    """DeepSpeed takes a GPU wherever there is one, as soon as anything imports it (peft does)."""
    os.environ["DS_ACCELERATOR"] = "cuda" if device.type == "cuda" else "cpu"
