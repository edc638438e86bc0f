"""What this machine is and can do, measured beside the rows: a figure counts only while the machine stays the same.

`python -m benchmarks.machine` prints its limits, and with `--product DEVICE` the seconds of a reference product.
"""

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from benchmarks.peers import ROOT
from llmtrain.gpus import num_gpus

Row = TypeVar("Row")

MOST_DRIFT = 0.10
"""A row during which the reference product moves by more than this is not reported."""
_SIZE, _HEAD = 2048, 50_257
_GPU_SIZE, _IN_A_ROW = 8192, 10


def choose_rows(names: list[str], on_cpu: dict[str, Row], on_gpu: dict[str, Row]) -> dict[str, Row]:
    """The rows of these names, or all that this machine can run; ends the program if it cannot run one."""
    possible = on_cpu | (on_gpu if num_gpus() else {})
    if missing := [name for name in names if name not in possible]:
        sys.exit(
            f"{', '.join(missing)}: not among the rows {', '.join(possible)}"
            + ("" if num_gpus() else f"; {', '.join(on_gpu)} need a GPU")
        )
    return {name: possible[name] for name in names or possible}


def described() -> str:
    """What the figures were measured on."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu}, {os.cpu_count()} cores{gpu}; Python {platform.python_version()}, torch {torch.__version__}"


def reference_s(device: str = "cpu") -> float:
    """Seconds of the reference product, in a process of its own: this one stays idle while rows are measured."""
    command = [sys.executable, "-m", "benchmarks.machine", "--product", device]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True)
    return float(done.stdout)


def drift(references_s: list[float]) -> float:
    """By how much the reference product moved between the fastest and the slowest of these."""
    return max(references_s) / min(references_s) - 1


def with_limits() -> str:
    """`described` and `limits`, found by another process: a child starts with its parent's peak memory."""
    command = [sys.executable, "-m", "benchmarks.machine"]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True).stdout.strip()


def limits() -> str:
    """Matrix products and copies, as a line for people."""
    import torch

    found: list[str] = []
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        a, b = (torch.randn(_SIZE, _SIZE, dtype=dtype) for _ in range(2))
        found.append(f"{name} product {2 * _SIZE**3 / _median_s(lambda a=a, b=b: a @ b) / 1e9:,.0f} GFLOP/s")
    rows, head = torch.randn(512, 768, dtype=torch.bfloat16), torch.randn(_HEAD, 768, dtype=torch.bfloat16)
    seconds = _median_s(lambda: rows @ head.t())
    found.append(f"bf16 512 x 768 x {_HEAD:,}: {2 * rows.numel() * _HEAD / seconds / 1e9:,.0f}")
    source = torch.randn(100_000_000)
    target = torch.empty_like(source)
    found.append(f"copy {2 * source.nbytes / _median_s(lambda: target.copy_(source)) / 1e9:.0f} GB/s")
    if torch.cuda.is_available():
        found.append(_gpu_limits())
    return ", ".join(found)


def _gpu_limits() -> str:
    import torch

    source = torch.randn(_GPU_SIZE, _GPU_SIZE, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    copy_s = _gpu_s(lambda: target.copy_(source))
    return (
        f"GPU bf16 product {2 * _GPU_SIZE**3 / _gpu_product_s() / 1e12:,.0f} TFLOP/s, "
        f"copy {2 * source.nbytes / copy_s / 1e12:.1f} TB/s"
    )


def _gpu_product_s(times: int = 7) -> float:
    import torch

    a, b = (torch.randn(_GPU_SIZE, _GPU_SIZE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return _gpu_s(lambda: a @ b, times)


def _gpu_s(work: Callable[[], object], times: int = 7) -> float:
    """As `_median_s`: of several in a row, and a wait for the GPU."""
    import torch

    def several() -> None:
        for _ in range(_IN_A_ROW):
            work()
        torch.cuda.synchronize()

    return _median_s(several, times) / _IN_A_ROW


def _median_s(work: Callable[[], object], times: int = 7) -> float:
    work()
    found: list[float] = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def main() -> None:
    if "--product" in sys.argv:
        import torch

        if sys.argv[-1] == "cuda":
            print(_gpu_product_s(times=25))
        else:
            a, b = torch.randn(_SIZE, _SIZE), torch.randn(_SIZE, _SIZE)
            print(_median_s(lambda: a @ b, times=25))
        return
    print(described())
    print(limits())


if __name__ == "__main__":
    main()
