"""Two ranks with one thread each, against one: `python -m benchmarks.ranks [ROUNDS]`.

A GPT of 7 M parameters, 4 x 256 a micro-batch, accumulation 8, fp32, log and TensorBoard at every step. The two cores
of a machine may share their arithmetic units, so the other yardstick is two runs that know nothing of each other, at
the same time. Rounds are interleaved; tokens/s of all ranks together, medians of the steps after the third.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import machine
from benchmarks.step import SMALL, WARM_UP, Row, from_events, settings_of, write_shards
from benchmarks.words import with_range
from llmtrain.allocator import SETTINGS

_MICRO, _ACCUMULATION, _STEPS = 4, 8, 8
ROW = Row("", SMALL, 2 * _MICRO * _ACCUMULATION, 8192, ("fp32",), (), _STEPS)


def start(folder: Path, name: str, ranks: int, kind: str = "ddp") -> subprocess.Popen[bytes]:
    batch = ranks * _MICRO * _ACCUMULATION
    settings = [
        *settings_of(folder, ROW, "fp32"), f"run.name={name}", "service.start=never",
        f"train.global_batch_size={batch}", f"train.micro_batch_size={_MICRO}", f"strategy.kind={kind}",
    ]  # fmt: skip
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *torchrun, "-m", "llmtrain", *settings]
    environment = {**os.environ, **SETTINGS, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def tokens_per_s(folder: Path, name: str, ranks: int) -> float:
    step_ms = statistics.median(from_events(folder / "runs" / name / "tensorboard").times_ms[WARM_UP:])
    return ranks * _MICRO * _ACCUMULATION * ROW.model["context"] / step_ms * 1e3


def finish(*processes: subprocess.Popen[bytes]) -> None:
    for process in processes:
        if process.wait():
            raise RuntimeError(f"{process.args!r}: exit code {process.returncode}")


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    found: dict[str, list[float]] = {"one rank": [], "two lone runs": [], "DDP": [], "ZeRO-2": []}
    with tempfile.TemporaryDirectory(dir=os.environ.get("SCRATCH")) as scratch:
        folder = Path(scratch)
        write_shards(folder, ROW)
        for number in range(rounds):
            finish(start(folder, f"one-{number}", 1))
            found["one rank"].append(tokens_per_s(folder, f"one-{number}", 1))
            finish(*(start(folder, f"lone-{number}-{which}", 1) for which in "ab"))
            found["two lone runs"].append(sum(tokens_per_s(folder, f"lone-{number}-{which}", 1) for which in "ab"))
            for name, kind in (("DDP", "ddp"), ("ZeRO-2", "zero2")):
                finish(start(folder, f"{kind}-{number}", 2, kind))
                found[name].append(tokens_per_s(folder, f"{kind}-{number}", 2))
    print(f"{machine.with_limits()}\n\n{rounds} rounds, one thread a rank\n")
    print("| | tokens/s, median (range) | of twice one rank's | of two lone runs' |\n|---|---|---|---|")
    one, lone = statistics.median(found["one rank"]), statistics.median(found["two lone runs"])
    for name, speeds in found.items():
        median = statistics.median(speeds)
        print(f"| {name} | {with_range(speeds)} | {median / 2 / one:.2f} | {median / lone:.2f} |")
    print(
        f"\nA step of ZeRO-2 takes {statistics.median(found['DDP']) / statistics.median(found['ZeRO-2']):.2f} of DDP's."
    )


if __name__ == "__main__":
    main()
