"""Our training step against named peers, in one run: `python -m benchmarks.step [ROW ...]`.

Every row runs ours and its peers in turn (A B C A B C ...), each in a process of its own, and prints
tokens/s and peak memory as medians with their range, and as ratios of ours to the peer's; beside them the loss after
the last step, and the time from a process's start to the end of its first step. Ours is the whole of
`python -m llmtrain`: loader, clipping, schedule, ledger and TensorBoard at every step. Ratios are of ours in what
`train.precision=auto` comes to here. Peers run as shipped, in bf16 where they can; `PEER-fp32` is the peer in fp32, and
`PEER+` with our allocator settings.

ROUNDS=5: that many rounds. NANOGPT=FOLDER: a checkout of nanoGPT, which is on no package index; without it its row is
left out, saying so. The rows `gpt2-gpu` and `xl-gpu` need a GPU; there everything is compiled, ours and the peers', and
memory is the GPU's.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.peers import ROOT, python_of
from benchmarks.words import with_range
from llmtrain import cpu
from llmtrain.allocator import SETTINGS

WARM_UP = 3
_LARGE = {"num_layers": 12, "num_heads": 12, "width": 768, "context": 256}
SMALL = {"num_layers": 4, "num_heads": 4, "width": 256, "context": 256, "dropout": 0.0}


@dataclass(frozen=True)
class Row:
    title: str
    model: dict[str, Any]
    batch: int
    vocab_size: int
    ours: tuple[str, ...]
    peers: tuple[str, ...]
    steps: int
    extra: list[str] = field(default_factory=list)
    warm_up: int = WARM_UP
    device: str = "cpu"


ROWS = {
    "lecture": Row(
        "Lecture model, 162 M, 2 x 256, dropout 0.1 (the lecture's loop is fp32)",
        {**_LARGE, "dropout": 0.1, "qkv_bias": False, "tie_weights": False, "init": "pytorch"},
        2, 50257, ("bf16", "fp32"), ("lecture", "lecture+"), 8, extra=["optim.clip_norm=null"],
    ),
    "gpt2": Row(
        "GPT-2, 124 M, 8 x 256, bf16, no dropout",
        {**_LARGE, "dropout": 0.0}, 8, 50257, ("bf16", "fp32"),
        ("hf", "hf+", "hf-fp32", "hf-fp32+", "litgpt", "litgpt+", "lightning", "lightning+", "nanogpt", "nanogpt+"), 7,
    ),
    "small": Row("Small GPT, 7 M, 16 x 256, bf16", SMALL, 16, 8192, ("bf16", "fp32"), ("hf", "litgpt"), 30),
}  # fmt: skip
GPU_ROWS = {
    "gpt2-gpu": Row(
        "GPT-2, 124 M, 32 x 1,024, bf16, compiled",
        {**_LARGE, "context": 1024, "dropout": 0.0}, 32, 50257, ("bf16",), ("hf", "nanogpt"), 60,
        ["train.compile=true", "train.micro_batch_size=32"], 20, "cuda",
    ),
    "xl-gpu": Row(
        "GPT-2 XL, 1.5 B, 8 x 1,024, bf16, compiled",
        {"num_layers": 48, "num_heads": 25, "width": 1600, "context": 1024, "dropout": 0.0},
        8, 50257, ("bf16",), ("hf", "nanogpt"), 40,
        ["train.compile=true", "train.micro_batch_size=8"], 20, "cuda",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Steps:
    """What one process said of itself."""

    times_ms: list[float]
    first_at: float | None
    """Time of day at which the first step had ended."""
    loss: float
    waited_ms: list[float] = field(default_factory=list)
    """For data, in each step."""
    gpu_memory_mb: float | None = None
    """The most that its tensors took of a GPU."""


@dataclass(frozen=True)
class Result:
    step_ms: float
    tokens_per_s: float
    memory_mb: float
    loss: float
    start_s: float | None
    """From the process's start to the end of its first step."""
    waited: float
    """Share of the time that went into waiting for data."""


def measure(
    command: list[str], row: Row, extra_env: dict[str, str], folder: Path, read: Callable[[str], Steps]
) -> Result:
    """Run one process; the median step after the warm-up, and its peak memory. `read` takes the process's output."""
    environment = {**os.environ, **extra_env, "PYTHONPATH": str(ROOT)}
    began = time.time()
    with (folder / "output").open("w+") as output, (folder / "errors").open("w+") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=environment, cwd=folder)
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        errors.seek(0)
        if status:
            raise RuntimeError(f"{' '.join(command)[:200]}\n{errors.read()[-3000:]}")
        steps = read(output.read())
    times_ms = steps.times_ms[row.warm_up :]
    step_ms = statistics.median(times_ms)
    return Result(
        step_ms,
        row.batch * row.model["context"] / step_ms * 1e3,
        usage.ru_maxrss * 1024 / 1e6 if steps.gpu_memory_mb is None else steps.gpu_memory_mb,
        steps.loss,
        None if steps.first_at is None else steps.first_at - began,
        sum(steps.waited_ms[row.warm_up :]) / sum(times_ms),
    )


def from_worker(output: str) -> Steps:
    said = json.loads(output.splitlines()[-1])
    return Steps(said["step_ms"], said["first_at"], said["loss"], gpu_memory_mb=said["gpu_memory_mb"])


def from_nanogpt(output: str) -> Steps:
    """Its lines `iter 3: loss 10.9, time 812.5ms, mfu ...`; the first ones are there before the first step."""
    found = re.findall(r"^iter \d+: loss ([\d.]+), time ([\d.]+)ms", output, re.MULTILINE)
    memory = re.search(r"^gpu memory ([\d.]+) MB", output, re.MULTILINE)
    return Steps([float(ms) for _, ms in found], None, float(found[-1][0]), gpu_memory_mb=memory and float(memory[1]))


def from_events(folder: Path) -> Steps:
    """Of our own run, from its event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    times, losses = events.Scalars("speed/step_ms"), events.Scalars("train/loss")
    waited = [event.value for event in events.Scalars("speed/data_wait_ms")]
    memory = "hardware/gpu_memory_peak_gb"
    gpu_mb = 1e3 * events.Scalars(memory)[-1].value if memory in events.Tags()["scalars"] else None
    return Steps([event.value for event in times], times[0].wall_time, losses[-1].value, waited, gpu_mb)


def write_shards(folder: Path, row: Row, num_steps: int = 16) -> Path:
    """Random rows as shards for ours, and as .npy for the peers; an epoch of so many steps."""
    from llmtrain import files, recipe, shards
    from llmtrain.config import load_config

    draw, context = np.random.default_rng(0), row.model["context"]
    tokens = draw.integers(0, row.vocab_size, (row.batch * num_steps, context + 1)).astype(np.uint16)
    np.save(folder / "rows.npy", tokens)
    config, _ = load_config(None, settings_of(folder, row, "fp32"))
    out = recipe.shard_folder(config)
    (out / "tokenizer").mkdir(parents=True)
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE({"<|endoftext|>": 0}, [])).save(str(out / "tokenizer/tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}  # as shards have that `llmtrain shard` made
    (out / "tokenizer/tokenizer_config.json").write_text(json.dumps(settings))
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


def settings_of(folder: Path, row: Row, precision: str) -> list[str]:
    return [
        *(f"model.{name}={json.dumps(value)}" for name, value in row.model.items()),
        f"data.dir={folder}/shards",
        f"run.dir={folder}/runs",
        f"train.global_batch_size={row.batch}",
        f"train.steps={row.steps}",
        f"train.precision={precision}",
        f"train.device={row.device}",
        "evaluate={every_steps: null, also_at: [], train_rows: 0, sample: {prompt: ''}}",
        "checkpoint.every_steps=null",
        "log.every_steps=1",
        "optim.lr=4e-4",
        *row.extra,
    ]


def run_ours(folder: Path, row: Row, precision: str, number: int) -> Result:
    name = f"{precision}-{number}"
    settings = [*settings_of(folder, row, precision), f"run.name={name}"]
    command = [sys.executable, "-m", "llmtrain", *settings]
    return measure(command, row, {}, folder, lambda _: from_events(folder / "runs" / name / "tensorboard"))


def run_peer(folder: Path, row: Row, name: str, python: str) -> Result:
    peer, _, precision = name.removesuffix("+").partition("-")
    settings = SETTINGS if name.endswith("+") else {}
    if peer == "nanogpt":
        return measure(nanogpt_command(folder, row, python), row, settings, folder, from_nanogpt)
    job = {
        "peer": peer, "rows": str(folder / "rows.npy"), "batch": row.batch, "steps": row.steps, "model": row.model,
        "vocab_size": row.vocab_size, "device": row.device, "precision": precision or "bf16",
    }  # fmt: skip
    command = [python, str(ROOT / "benchmarks/worker.py"), json.dumps(job)]
    return measure(command, row, settings, folder, from_worker)


def nanogpt_command(folder: Path, row: Row, python: str) -> list[str]:
    """Its own train.py on the CPU, over the same tokens; it reads its data and its configuration where it stands."""
    checkout = folder / "nanogpt"
    if not checkout.exists():
        shutil.copytree(os.environ["NANOGPT"], checkout, ignore=shutil.ignore_patterns(".git"))
        data = checkout / "data/rows"
        data.mkdir(parents=True)
        for split in ("train", "val"):
            np.load(folder / "rows.npy").tofile(data / f"{split}.bin")
    m = row.model
    settings = {
        "dataset": "rows", "out_dir": str(folder / "nanogpt-out"),
        "device": row.device, "compile": row.device == "cuda",
        "dtype": "bfloat16", "eval_interval": 10**6, "eval_iters": 1,
        "gradient_accumulation_steps": 1, "batch_size": row.batch,
        "block_size": m["context"], "n_layer": m["num_layers"], "n_head": m["num_heads"], "n_embd": m["width"],
        "dropout": m["dropout"], "bias": True, "max_iters": row.steps, "warmup_iters": 0, "learning_rate": 4e-4,
    }  # fmt: skip
    start = f"import os, runpy, sys; os.chdir({str(checkout)!r}); sys.path.insert(0, '.'); runpy.run_path('train.py')"
    if row.device == "cuda":
        start += "; import torch; print(f'gpu memory {torch.cuda.max_memory_allocated() / 1e6:.0f} MB')"
    return [python, "-c", start, *(f"--{name}={value}" for name, value in settings.items())]


def installed(row: Row) -> dict[str, str]:
    """The row's peers that can run here, each with its interpreter; what cannot is said."""
    found: dict[str, str] = {}
    for name in row.peers:
        if name.startswith("nanogpt") and "NANOGPT" not in os.environ:
            print("nanoGPT: left out; NANOGPT=FOLDER names a checkout of it", file=sys.stderr)
        elif (python := python_of(re.split(r"\W", name)[0])) is not None:
            found[name] = python
    return found


def run_row(row: Row, rounds: int) -> str:
    """All processes of a row, interleaved; the table as markdown.

    A round in which the machine changed its speed is thrown away and taken again, at most as often as rounds are
    wanted; then the row is not reported.
    """
    pythons = installed(row)
    kept: list[dict[str, Result]] = []
    moved: list[float] = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("SCRATCH")) as scratch:
        folder = Path(scratch)
        write_shards(folder, row)
        before = machine.reference_s(row.device)
        for number in range(2 * rounds):
            results: dict[str, Result] = {}
            for precision in row.ours:
                results[f"llmtrain {precision}"] = run_ours(folder, row, precision, number)
            for peer, python in pythons.items():
                results[peer] = run_peer(folder, row, peer, python)
                print(f"{peer}: {results[peer].tokens_per_s:,.0f} tokens/s", file=sys.stderr, flush=True)
            after = machine.reference_s(row.device)
            drift = machine.drift([before, after])
            said = {name: round(result.tokens_per_s) for name, result in results.items()}
            print(f"round {number + 1}: reference moved by {drift:.0%}; tokens/s {said}", file=sys.stderr, flush=True)
            before = after
            if drift <= machine.MOST_DRIFT:
                kept.append(results)
                moved.append(drift)
            if len(kept) == rounds:
                return table(row, kept) + f"\nReference product steady within {max(moved):.0%} in each round.\n"
    return (
        f"### {row.title}\n\nNot reported: in only {len(kept)} of {2 * rounds} rounds the machine's reference product "
        f"moved by at most {machine.MOST_DRIFT:.0%}. Something else was running; try again.\n"
    )


def table(row: Row, rounds: list[dict[str, Result]]) -> str:
    """Medians; ratios are the medians of the rounds' own ratios."""

    def median(name: str, what: str) -> float:
        return statistics.median(getattr(results[name], what) for results in rounds)

    def ratio(name: str, what: str) -> float:
        return statistics.median(getattr(results[ours], what) / getattr(results[name], what) for results in rounds)

    auto = "bf16" if row.device == "cuda" or cpu.has_fast_bf16() else "fp32"
    ours = f"llmtrain {auto if auto in row.ours else row.ours[0]}"
    lines = [
        f"### {row.title}",
        "",
        "| | tokens/s (range) | ours / it | peak memory | ours / it | start to step 1 | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in rounds[0]:
        speeds = [results[name].tokens_per_s for results in rounds]
        starts = [start_s for results in rounds if (start_s := results[name].start_s) is not None]
        start = f"{statistics.median(starts):.1f} s" if starts else ""
        lines.append(
            f"| {name} | {with_range(speeds)} | "
            f"{ratio(name, 'tokens_per_s'):.2f} | {median(name, 'memory_mb'):,.0f} MB | "
            f"{ratio(name, 'memory_mb'):.2f} | {start} | {median(name, 'loss'):.4f} |"
        )
    lines += ["", f"Ours waited for data {median(ours, 'waited'):.2%} of the time."]
    return "\n".join(lines) + "\n"


def main() -> None:
    rows = machine.choose_rows(sys.argv[1:], ROWS, GPU_ROWS)
    rounds = int(os.environ.get("ROUNDS", "3"))
    print(f"{rounds} rounds\n{machine.with_limits()}\n", flush=True)
    for row in rows.values():
        print(run_row(row, rounds), flush=True)


if __name__ == "__main__":
    main()
