"""Our training step against named peers, in one run: `python -m benchmarks.step [ROW ...]`.

Every row runs ours and its peers in turn (A B C A B C ...), each in a process of its own, and prints
tokens/s and peak memory as medians with their range, and as ratios of ours to the peer's. Ours is the whole of
`python -m llmtrain`: loader, clipping, schedule, ledger and TensorBoard at every step. Peers run as shipped.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import ROOT, python_of
from llmtrain.allocator import SETTINGS

_WARM_UP = 3
_LARGE = {"num_layers": 12, "num_heads": 12, "width": 768, "context": 256}
_SMALL = {"num_layers": 4, "num_heads": 4, "width": 256, "context": 256, "dropout": 0.0}


@dataclass(frozen=True)
class Row:
    title: str
    model: dict[str, Any]
    batch: int
    vocab_size: int
    ours: tuple[str, ...]
    peers: tuple[str, ...]
    steps: int
    peer_bf16: bool = True
    extra: list[str] = field(default_factory=list)


ROWS = {
    "lecture": Row(
        "Lecture model, 162 M, 2 x 256, dropout 0.1 (the lecture's loop is fp32)",
        {**_LARGE, "dropout": 0.1, "qkv_bias": False, "tie_weights": False, "init": "pytorch"},
        2, 50257, ("bf16", "fp32"), ("lecture",), 8, extra=["optim.clip_norm=null"],
    ),
    "gpt2": Row(
        "GPT-2, 124 M, 8 x 256, bf16, no dropout",
        {**_LARGE, "dropout": 0.0}, 8, 50257, ("bf16",), ("hf", "litgpt"), 7,
    ),
    "small": Row("Small GPT, 7 M, 16 x 256, bf16", _SMALL, 16, 8192, ("bf16",), ("hf", "litgpt"), 30),
    "overhead": Row(
        "Small GPT, 7 M, 16 x 256, bf16: the framework's own overhead", _SMALL, 16, 8192, ("bf16",), ("bare",), 30
    ),
    "tiny": Row(
        "Tiny GPT (2 layers, width 64), 8 x 64, fp32: the loop's own overhead",
        {"num_layers": 2, "num_heads": 2, "width": 64, "context": 64, "dropout": 0.0},
        8, 1024, ("fp32",), ("bare",), 400, peer_bf16=False,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    tokens_per_s: float
    memory_mb: float


def measure(command: list[str], row: Row, extra_env: dict[str, str], folder: Path, events: Path | None) -> Result:
    """Run one process; the median step after the warm-up, and its peak memory."""
    environment = {**os.environ, **extra_env, "PYTHONPATH": str(ROOT)}
    with (folder / "output").open("w+") as output, (folder / "errors").open("w+") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=environment, cwd=folder)
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        errors.seek(0)
        if status:
            raise RuntimeError(f"{' '.join(command)[:200]}\n{errors.read()[-3000:]}")
        times = step_times(events) if events is not None else json.loads(output.read().splitlines()[-1])["step_ms"]
    return Result(
        row.batch * row.model["context"] / statistics.median(times[_WARM_UP:]) * 1e3, usage.ru_maxrss * 1024 / 1e6
    )


def step_times(folder: Path) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [event.value for event in EventAccumulator(str(folder)).Reload().Scalars("speed/step_ms")]


def write_shards(folder: Path, row: Row) -> Path:
    """Random rows as shards for ours, and as .npy for the peers."""
    from llmtrain import files, recipe, shards
    from llmtrain.config import load_config

    draw, context = np.random.default_rng(0), row.model["context"]
    tokens = draw.integers(0, row.vocab_size, (row.batch * 16, context + 1)).astype(np.uint16)
    np.save(folder / "rows.npy", tokens)
    config, _ = load_config(None, _settings(folder, row, "fp32"))
    out = recipe.shard_folder(config)
    (out / "tokenizer").mkdir(parents=True)
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE({"<|endoftext|>": 0}, [])).save(str(out / "tokenizer/tokenizer.json"))
    splits: dict[Any, Any] = {}
    for name, part in (("train", tokens), ("heldout", tokens[: row.batch])):
        path = out / f"{name}-00000.arrow"
        shards.write_shard(path, shards.Rows(part, [np.array([context + 1], np.int32)] * len(part), None))
        info = shards.ShardInfo(
            file=path.name, size_bytes=path.stat().st_size, sha256=files.sha256(path), rows=len(part), tokens=part.size,
            max_id=int(part.max()),
        )  # fmt: skip
        splits[name] = shards.SplitInfo(
            rows=len(part), tokens=part.size, targets=len(part) * context, documents=len(part), text_bytes=1,
            text_tokens=part.size, tokens_dropped=0, shards=[info],
        )  # fmt: skip
    manifest = shards.ShardManifest(
        recipe=recipe.recipe_of(config),
        tokenizer=shards.TokenizerInfo(
            sha256=files.sha256(out / "tokenizer/tokenizer.json"), vocab_size=row.vocab_size, eos_id=0
        ),
        context=context,
        packing="contiguous",
        splits=splits,
    )
    (out / "manifest.json").write_bytes(manifest.to_bytes())
    return folder / "rows.npy"


def _settings(folder: Path, row: Row, precision: str) -> list[str]:
    return [
        *(f"model.{name}={json.dumps(value)}" for name, value in row.model.items()),
        f"data.dir={folder}/shards",
        f"run.dir={folder}/runs",
        f"train.global_batch_size={row.batch}",
        f"train.steps={row.steps}",
        f"train.precision={precision}",
        "train.device=cpu",
        "evaluate={every_steps: null, also_at: [], train_rows: 0, sample: {prompt: ''}}",
        "checkpoint.every_steps=null",
        "log.every_steps=1",
        "optim.lr=4e-4",
        *row.extra,
    ]


def run_ours(folder: Path, row: Row, precision: str, number: int) -> Result:
    name = f"{precision}-{number}"
    settings = [*_settings(folder, row, precision), f"run.name={name}"]
    command = [sys.executable, "-m", "llmtrain", *settings]
    return measure(command, row, {}, folder, folder / "runs" / name / "tensorboard")


def run_peer(folder: Path, row: Row, peer: str, python: str) -> Result:
    job = {
        "peer": peer, "rows": str(folder / "rows.npy"), "batch": row.batch, "steps": row.steps, "model": row.model,
        "vocab_size": row.vocab_size, "bf16": row.peer_bf16,
    }  # fmt: skip
    # The bare loop shall differ from ours by the loop alone; the others run as shipped.
    settings = SETTINGS if peer == "bare" else {}
    return measure([python, str(ROOT / "benchmarks/worker.py"), json.dumps(job)], row, settings, folder, None)


def run_row(row: Row, rounds: int) -> str:
    """All processes of a row, interleaved; the table as markdown."""
    pythons = {peer: python for peer in row.peers if (python := python_of(peer)) is not None}
    results: dict[str, list[Result]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_shards(folder, row)
        for number in range(rounds):
            for precision in row.ours:
                results.setdefault(f"llmtrain {precision}", []).append(run_ours(folder, row, precision, number))
            for peer, python in pythons.items():
                results.setdefault(peer, []).append(run_peer(folder, row, peer, python))
    speed = {name: statistics.median(r.tokens_per_s for r in found) for name, found in results.items()}
    memory = {name: statistics.median(r.memory_mb for r in found) for name, found in results.items()}
    ours = f"llmtrain {row.ours[0]}"
    lines = [
        f"### {row.title}",
        "",
        "| | tokens/s (range) | ours / it | peak memory | ours / it |",
        "|---|---|---|---|---|",
    ]
    for name, found in results.items():
        low, high = min(r.tokens_per_s for r in found), max(r.tokens_per_s for r in found)
        lines.append(
            f"| {name} | {speed[name]:,.0f} ({low:,.0f} to {high:,.0f}) | {speed[ours] / speed[name]:.2f} | "
            f"{memory[name]:,.0f} MB | {memory[ours] / memory[name]:.2f} |"
        )
    return "\n".join(lines) + "\n"


def machine() -> str:
    """What the figures were measured on."""
    import torch

    described = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in described if "model name" in line), "")
    return f"{cpu}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}"


def main() -> None:
    wanted = sys.argv[1:] or list(ROWS)
    rounds = int(os.environ.get("ROUNDS", "3"))
    print(f"{machine()}; {rounds} rounds\n")
    for name in wanted:
        print(run_row(ROWS[name], rounds), flush=True)


if __name__ == "__main__":
    main()
