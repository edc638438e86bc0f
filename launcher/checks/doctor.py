"""`llmtrain doctor`: what this machine has of what a run needs. Nothing is loaded or changed."""

import contextlib
import os
import re
import shutil
import sys
from collections import Counter
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
from llmtrain.gpus import GPU, Driver, all_gpus, driver_problem, find_driver, has_bf16
from llmtrain.wording import listed

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
    found, driver, gpus = look_into([sys.executable]), find_driver(), all_gpus()
    return [
        *_examine_python(found, driver if any(not gpu.is_hidden for gpu in gpus) else None),
        *_examine_gpus(driver, gpus),
        *_examine_kernels(found, gpus),
        _examine_cpu(),
        fine("memory", f"{display.size(psutil.virtual_memory().total)}"),
        _examine_disk(),
        _examine_slurm(),
        examine_login(),
    ]


def _examine_python(found: Environment, driver: Driver | None) -> list[Finding]:
    """`driver`: of GPUs that runs would use; None where there are none."""
    python = fine("Python", f"{found.version} in {found.prefix}")
    if found.torch is None:
        return [python, wrong("torch", "not installed: make setup (docs/dependencies.md)")]
    build = f"{found.torch.version} for {found.torch.accelerator or 'CPUs alone'}"
    if driver is None:
        return [python, fine("torch", build)]
    if found.torch.accelerator is None:
        advice = f"it cannot use the GPUs here; install a build of this version for CUDA ({_BUILDS})"
        return [python, wrong("torch", f"{build}: {advice}")]
    built = found.torch.accelerator.removeprefix("CUDA ").split(".")
    if built[0].isdigit() and int(built[0]) > driver.cuda[0]:
        advice = f"update it, or install this version's build for an older CUDA ({_BUILDS})"
        driver_goes = f"the driver here goes up to CUDA {_version(driver.cuda)}"
        return [python, wrong("torch", f"{build}, and {driver_goes}: {advice}")]
    return [python, fine("torch", build)]


def _examine_gpus(driver: Driver | None, gpus: list[GPU]) -> list[Finding]:
    if (problem := driver_problem()) is not None:
        return [wrong("GPUs", f"{problem}: runs would find none; mend the driver (often a reboot)")]
    if driver is None:
        return [fine("GPUs", "none of NVIDIA's here: runs take the CPU (or Apple's MPS)")]
    failed = [
        (doubtful if gpu.is_hidden else wrong)("GPUs", f"GPU {gpu.number} does not answer ({gpu.problem})")
        for gpu in gpus
        if gpu.problem is not None
    ]
    kinds = Counter(_describe(gpu) for gpu in gpus if gpu.problem is None)
    if failed and not kinds:
        return failed
    models = "; ".join(f"{number} x {kind}" for kind, number in kinds.items()) or "a driver, and no GPU"
    message = f"{models}; driver {driver.version} up to CUDA {_version(driver.cuda)}"
    hidden = [gpu.number for gpu in gpus if gpu.is_hidden]
    if not hidden:
        return [fine("GPUs", message), *failed]
    if len(hidden) == len(gpus):
        return [doubtful("GPUs", f"{message}; CUDA_VISIBLE_DEVICES hides all of them: runs take the CPU"), *failed]
    numbers = listed((f"GPU {number}" for number in hidden), most=len(hidden))
    return [fine("GPUs", f"{message}; CUDA_VISIBLE_DEVICES hides {numbers} from runs"), *failed]


def _examine_kernels(found: Environment, gpus: list[GPU]) -> list[Finding]:
    """GPUs that the torch here holds no code for: the first step would fail."""
    if found.torch is None or not (built := re.fullmatch(r"CUDA (\d+)\.(\d+)", found.torch.accelerator or "")):
        return []  # said already
    # Of torch 2.13's builds; a test compares it with torch's own table. A newer GPU takes a newer build.
    is_old = (int(built[1]), int(built[2])) <= (12, 6)
    first, last = ((5, 0), (9, 0)) if is_old else ((7, 5), (99, 0))
    wanted = "a newer CUDA" if is_old else "CUDA 12.6"
    without = dict.fromkeys(
        f"{gpu.name} (compute capability {_version(gpu.capability)})"
        for gpu in gpus
        if gpu.problem is None and not gpu.is_hidden and not first <= gpu.capability <= last
    )
    return [
        wrong(
            "GPUs",
            f"torch for {found.torch.accelerator} holds no code for {gpu}; install its build for {wanted} ({_BUILDS})",
        )
        for gpu in without
    ]


def _describe(gpu: GPU) -> str:
    memory = "memory that it does not tell" if gpu.memory_bytes is None else display.size(gpu.memory_bytes)
    return f"{gpu.name} with {memory}, {'fast bf16' if has_bf16(gpu.capability) else 'no fast bf16'}"


def _version(numbers: tuple[int, int]) -> str:
    return f"{numbers[0]}.{numbers[1]}"


def _examine_cpu() -> Finding:
    bf16 = "fast bf16" if cpu.has_fast_bf16() else "no fast bf16: runs on it take fp32"
    return fine("CPU", f"{cpu.usable_cores()} cores, {bf16}")


def _examine_disk() -> Finding:
    place = nearest_existing(Path("runs"))
    free = shutil.disk_usage(place).free
    kind = kind_of_file_system(place.resolve())
    found = f"{display.size(free)} free in {place}{f' ({kind})' if kind else ''}"
    if free < _SCARCE_BYTES:
        return doubtful("disk", f"{found}: checkpoints take several GB each")
    return fine("disk", found)


def _examine_slurm() -> Finding:
    if not client.is_here():
        return fine("SLURM", "not here: 'llmtrain run' trains on this machine")
    try:
        names = [f"{name} (default)" if each.is_default else name for name, each in partitions().items()]
    except SlurmError as error:
        return doubtful("SLURM", str(error))
    return fine("SLURM", f"partitions {listed(names)}; 'llmtrain doctor --cluster' drafts a profile")


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
