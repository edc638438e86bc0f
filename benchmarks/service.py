"""What the checkpoint service costs training: uploading every save to a slow Hub against no service at all.

    python -m benchmarks.service [ROUNDS]

The same small run each time, in turn (A B A B ...): without a service; with one that uploads to a server on the
loopback that reads 10 MB/s; with one that scores on the same CPU too. Training's speed is measured between its first
and its last step, from the times in its event files, so start-up and the wait at the end are left out.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.step import machine
from tests.support.hub_server import HubProcess, client_environment

BYTES_PER_S = 10_000_000
STEPS = 150
SETTINGS = [
    "model.num_layers=6", "model.width=384", "model.num_heads=6", "data.tokenizer.vocab_size=4096",
    f"train.steps={STEPS}",
    "train.global_batch_size=8", "checkpoint.every_steps=25", "evaluate.every_steps=null", "evaluate.also_at=[]",
    "evaluate.train_rows=0", "evaluate.sample.tokens=1", "log.every_steps=1", "service.wait_s=600",
]  # fmt: skip
WAYS = {
    "no service": ["service.start=never"],
    "uploading to a slow Hub": ["service.score=training", "hub.publish_every_s=5"],
    "and scoring on the same CPU": ["service.score=cpu", "hub.publish_every_s=5"],
}


def tokens_per_s(folder: Path, name: str, settings: list[str], hub: HubProcess) -> float:
    """Of one run, between its first and its last step."""
    repo = [] if "service.start=never" in settings else [f"hub.repo=tester/{name}"]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "llmtrain",
            f"run.name={name}",
            "run.dir=runs",
            "data.dir=shards",
            *SETTINGS,
            *settings,
            *repo,
        ],
        cwd=folder,
        env={**client_environment(hub.endpoint, folder / "home"), "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    events = EventAccumulator(str(folder / "runs" / name / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    points = events.Scalars("train/loss")
    rows, context = 8, 256
    return (points[-1].step - points[0].step) * rows * context / (points[-1].wall_time - points[0].wall_time)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    with (
        tempfile.TemporaryDirectory(dir=os.environ.get("SCRATCH")) as scratch,
        HubProcess(Path(scratch) / "hub") as hub,
    ):
        hub.control(add=[{"kind": "slow_request", "bytes_per_s": BYTES_PER_S, "match": "^PUT ", "times": 10**9}])
        folder = Path(scratch)
        tokens_per_s(folder, "warm-up", ["service.start=never", "train.steps=3"], hub)  # builds the shards
        for number in range(rounds):
            for way, settings in WAYS.items():
                found[way].append(tokens_per_s(folder, f"{way.replace(' ', '-')}-{number}", settings, hub))
    print(f"{machine()}; {rounds} rounds\n")
    print("| a checkpoint every 25 steps | tokens/s (range) | ratio (range of rounds) |\n|---|---|---|")
    for way, speeds in found.items():
        ratios = [a / b for a, b in zip(speeds, found["no service"], strict=True)]
        print(
            f"| {way} | {statistics.median(speeds):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f}) "
            f"| {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) |"
        )


if __name__ == "__main__":
    main()
