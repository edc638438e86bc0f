"""What the checkpoint service costs training: uploading every save to a slow Hub against no service at all.

    python -m benchmarks.service [ROUNDS] [--scoring]

The same small run each time, in turn (A B B A ...): without a service, and with one that uploads to a server on the
loopback that reads 10 MB/s; with --scoring also with one that scores on the same CPU. A checkpoint about once a minute.
Training's speed is taken from the times in its event files, from a moment after the first checkpoint on, so that
start-up (of training and of the service) and the wait at the end are left out.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks import machine
from benchmarks.words import with_range
from tests.support.hub_server import HubProcess, client_environment

BYTES_PER_S = 10_000_000
FIRST, EVERY, STEPS = 65, 50, 165
"""Measured from the first of these steps to the last: two checkpoints lie between."""
SETTINGS = [
    "model.num_layers=6", "model.width=384", "model.num_heads=6", "data.tokenizer.vocab_size=4096",
    f"train.steps={STEPS}",
    "train.global_batch_size=8", f"checkpoint.every_steps={EVERY}", "evaluate.every_steps=null", "evaluate.also_at=[]",
    "evaluate.train_rows=0", "evaluate.sample.tokens=1", "log.every_steps=1", "service.wait_s=600",
]  # fmt: skip
WAYS = {
    "no service": ["service.start=never"],
    "uploading to a slow Hub": ["service.score=training"],
    "and scoring on the same CPU": ["service.score=cpu"],
}


def tokens_per_s(folder: Path, name: str, settings: list[str], hub: HubProcess) -> float:
    """Of one run, between the steps FIRST and STEPS."""
    repo = [] if "service.start=never" in settings else [f"hub.repo=tester/{name}"]
    where = [f"run.name={name}", "run.dir=runs", "data.dir=shards"]
    subprocess.run(
        [sys.executable, "-m", "llmtrain", *where, *SETTINGS, *settings, *repo],
        cwd=folder,
        env={**client_environment(hub.endpoint, folder / "home"), "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    events = EventAccumulator(str(folder / "runs" / name / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    points = [point for point in events.Scalars("train/loss") if point.step >= FIRST]
    rows, context = 8, 256
    return (points[-1].step - points[0].step) * rows * context / (points[-1].wall_time - points[0].wall_time)


def main() -> None:
    rounds = next((int(word) for word in sys.argv[1:] if word.isdigit()), 3)
    ways = list(WAYS) if "--scoring" in sys.argv else list(WAYS)[:2]
    found: dict[str, list[float]] = {way: [] for way in ways}
    with (
        tempfile.TemporaryDirectory(dir=os.environ.get("SCRATCH")) as scratch,
        HubProcess(Path(scratch) / "hub") as hub,
    ):
        hub.control(add=[{"kind": "slow_request", "bytes_per_s": BYTES_PER_S, "match": "^PUT ", "times": 10**9}])
        os.setpriority(os.PRIO_PROCESS, hub.process.pid, 19)  # it stands for a machine elsewhere
        folder = Path(scratch)
        tokens_per_s(folder, "warm-up", ["service.start=never", f"train.steps={FIRST + 2}"], hub)  # builds the shards
        for number in range(rounds):
            for way in ways if number % 2 == 0 else reversed(ways):
                found[way].append(tokens_per_s(folder, f"{way.replace(' ', '-')}-{number}", WAYS[way], hub))
    print(f"{machine.described()}; {rounds} rounds\n")
    print(f"| a checkpoint every {EVERY} steps | tokens/s (range) | ratio (range of rounds) |\n|---|---|---|")
    for way, speeds in found.items():
        ratios = [a / b for a, b in zip(speeds, found["no service"], strict=True)]
        print(f"| {way} | {with_range(speeds)} | {with_range(ratios, '.3f')} |")


if __name__ == "__main__":
    main()
