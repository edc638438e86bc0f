"""What this machine is and can do, measured beside the rows: a figure counts only while the machine stays the same.

`python -m benchmarks.machine` prints its limits, and with `--product` the seconds of one reference product.
"""

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.peers import ROOT

MOST_DRIFT = 0.10
"""A row during which the reference product moves by more than this is not reported."""
_SIZE, _HEAD = 2048, 50_257


def described() -> str:
    """What the figures were measured on."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return f"{cpu}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}"


def reference_s() -> float:
    """Seconds of the reference product, in a process of its own: this one stays idle while rows are measured."""
    command = [sys.executable, "-m", "benchmarks.machine", "--product"]
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
    return ", ".join(found)


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

        a, b = torch.randn(_SIZE, _SIZE), torch.randn(_SIZE, _SIZE)
        print(_median_s(lambda: a @ b, times=25))
        return
    print(described())
    print(limits())


if __name__ == "__main__":
    main()
