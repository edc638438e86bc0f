"""`llmtrain doctor`: what this machine has of what a run needs. Nothing is loaded or changed."""

import contextlib
import os
import re
import shutil
import sys
from pathlib import Path

import psutil
from rich.console import Console

from launcher import display
from launcher.checks.draft import draft_profile
from launcher.checks.environment import Environment, look_into
from launcher.checks.places import kind_of_file_system, nearest_existing
from launcher.findings import Finding, doubtful, fine, show, wrong
from launcher.slurm import client
from launcher.slurm.partitions import partitions
from llmtrain import cpu
from llmtrain.errors import ConfigError, SlurmError
from llmtrain.gpus import driver_problem

_SCARCE_BYTES = 10e9
_BUILDS = 'docs/dependencies.md, "Another build of torch"'


def report() -> None:
    """Print what `examine` finds. Leaves with 2 where a run could not start."""
    findings = examine()
    show(findings, Console())
    if any(finding.severity == "error" for finding in findings):
        raise SystemExit(2)


def draft(partition: str | None, output: Path | None) -> None:
    """Print a drafted profile, or write it to a new file.

    Raises:
        ConfigError: the file exists.
        SlurmError: SLURM is not here or does not answer.
    """
    text = draft_profile(partition, output)
    if output is None:
        print(text, end="")
        return
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError([f"{output} exists; name another file, or move it away"]) from None
    print(f"{output}: look through the lines marked FILL IN")


def examine() -> list[Finding]:
    """Everything, in the order in which a run needs it."""
    drivers, found = _driver_cuda(), look_into([sys.executable])
    return [
        *_examine_python(found, drivers),
        *_examine_gpus(drivers),
        *([] if drivers is None else _examine_kernels(found)),
        _examine_cpu(),
        fine("memory", f"{display.size(psutil.virtual_memory().total)}"),
        _examine_disk(Path("runs")),
        _examine_slurm(),
        examine_login(),
    ]


def _examine_python(found: Environment, driver: tuple[int, int] | None) -> list[Finding]:
    python = fine("Python", f"{found.version} in {found.prefix}")
    if found.torch is None:
        return [python, wrong("torch", "not installed: make setup (docs/dependencies.md)")]
    told = f"{found.torch.version} for {found.torch.accelerator or 'CPUs alone'}"
    if driver is None:
        return [python, fine("torch", told)]
    if found.torch.accelerator is None:
        told += f": it cannot use the GPUs here; install a build of this version for CUDA ({_BUILDS})"
        return [python, wrong("torch", told)]
    built = found.torch.accelerator.removeprefix("CUDA ").split(".")
    if built[0].isdigit() and int(built[0]) > driver[0]:
        told += f", and the driver here goes up to CUDA {driver[0]}.{driver[1]}: "
        told += f"update it, or install this version's build for an older CUDA ({_BUILDS})"
        return [python, wrong("torch", told)]
    return [python, fine("torch", told)]


def _driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the NVIDIA driver here can run; None without one that works."""
    import pynvml

    try:
        pynvml.nvmlInit()
        version = int(pynvml.nvmlSystemGetCudaDriverVersion())
    except pynvml.NVMLError:
        return None
    return version // 1000, version % 1000 // 10


def _examine_gpus(driver: tuple[int, int] | None) -> list[Finding]:
    if (problem := driver_problem()) is not None:
        return [wrong("GPUs", f"{problem}: runs would find none; mend the driver (often a reboot)")]
    if driver is None:
        return [fine("GPUs", "none of NVIDIA's here: runs take the CPU (or Apple's MPS)")]
    import pynvml

    kinds: dict[str, int] = {}
    failed: list[Finding] = []
    for number in range(pynvml.nvmlDeviceGetCount()):
        try:
            kind = _describe_gpu(number)
        except pynvml.NVMLError as error:  # such as one that has fallen off the bus
            failed.append(wrong("GPUs", f"GPU {number} does not answer ({error})"))
        else:
            kinds[kind] = kinds.get(kind, 0) + 1
    listed = "; ".join(f"{count} x {kind}" for kind, count in kinds.items()) or "a driver, and no GPU"
    version = f"driver {pynvml.nvmlSystemGetDriverVersion()} up to CUDA {driver[0]}.{driver[1]}"
    return failed if failed and not kinds else [fine("GPUs", f"{listed}; {version}"), *failed]


def _examine_kernels(found: Environment) -> list[Finding]:
    """GPUs that the torch here holds no code for: the first step would fail."""
    import pynvml

    if found.torch is None or not (built := re.fullmatch(r"CUDA (\d+)\.(\d+)", found.torch.accelerator or "")):
        return []  # said already
    # Of torch 2.13's builds; a test compares it with torch's own table. A newer GPU takes a newer build.
    is_old = (int(built[1]), int(built[2])) <= (12, 6)
    first, last = ((5, 0), (9, 0)) if is_old else ((7, 5), (99, 0))
    wanted = "a newer CUDA" if is_old else "CUDA 12.6"
    without: dict[str, None] = {}
    for number in range(pynvml.nvmlDeviceGetCount()):
        with contextlib.suppress(pynvml.NVMLError):  # said already
            handle = pynvml.nvmlDeviceGetHandleByIndex(number)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            if not first <= (major, minor) <= last:
                without[f"{pynvml.nvmlDeviceGetName(handle)} (compute capability {major}.{minor})"] = None
    return [
        wrong(
            "GPUs",
            f"torch for {found.torch.accelerator} holds no code for {gpu}; install its build for {wanted} ({_BUILDS})",
        )
        for gpu in without
    ]


def _describe_gpu(number: int) -> str:
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(number)
    major, _ = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    try:
        memory = display.size(float(pynvml.nvmlDeviceGetMemoryInfo(handle).total))
    except pynvml.NVMLError:  # where it shares the machine's, as on Grace-Blackwell desktops
        memory = "memory that it does not tell"
    return f"{pynvml.nvmlDeviceGetName(handle)} with {memory}, {'fast bf16' if major >= 8 else 'no fast bf16'}"


def _examine_cpu() -> Finding:
    bf16 = "fast bf16" if cpu.has_fast_bf16() else "no fast bf16: runs on it take fp32"
    return fine("CPU", f"{cpu.usable_cores()} cores, {bf16}")


def _examine_disk(runs: Path) -> Finding:
    place = nearest_existing(runs)
    free = shutil.disk_usage(place).free
    kind = kind_of_file_system(place.resolve())
    told = f"{display.size(free)} free in {place}{f' ({kind})' if kind else ''}"
    return doubtful("disk", f"{told}: checkpoints take several GB each") if free < _SCARCE_BYTES else fine("disk", told)


def _examine_slurm() -> Finding:
    if not client.is_here():
        return fine("SLURM", "not here: 'llmtrain run' trains on this machine")
    try:
        names = [f"{name} (default)" if each.is_default else name for name, each in partitions().items()]
    except SlurmError as error:
        return doubtful("SLURM", str(error))
    return fine("SLURM", f"partitions {display.words(names)}; 'llmtrain doctor --cluster' drafts a profile")


def examine_login() -> Finding:
    """Where the Hub's client would find a token. The token itself is not looked at."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name, "").strip():
            return fine("Hub", f"a token in {name}")
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    with contextlib.suppress(RuntimeError):  # neither HOME nor an entry in passwd
        file = Path(os.environ.get("HF_TOKEN_PATH", Path(os.environ.get("HF_HOME", home)) / "token")).expanduser()
        if file.is_file() and file.stat().st_size:
            return fine("Hub", f"logged in ({file})")
    return fine("Hub", "not logged in: for uploads and gated models run 'hf auth login'")
