"""QLoRA against TRL's SFTTrainer, in one run: `python -m benchmarks.qlora [ROW ...]`.

The same random-weight Llama in nf4, the same records, LoRA on all linear layers, bf16, AdamW, the same rows.
Processes run in turn (A B A B ...), each alone; tokens/s (without padding) and peak memory as medians with
their range. TRL runs as shipped; the last row is TRL with our allocator settings. With a GPU the rows of an 8B-shaped
Llama with 16k tokens in a row are there too, with recomputation and without; memory is the GPU's there.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.peers import ROOT, python_of
from benchmarks.step import from_events
from benchmarks.words import with_range
from llmtrain.allocator import SETTINGS

_WARM_UP = 2
_SMALL: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 4, "vocab_size": 32_000, "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip
_LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 16_384, "tie_word_embeddings": False,
}  # fmt: skip
_RANK = 16


@dataclass(frozen=True)
class Row:
    title: str
    packing: bool
    batch: int
    context: int
    steps: int
    base: dict[str, Any] = field(default_factory=lambda: _SMALL)
    device: str = "cpu"
    recompute: bool = False


ROWS = {
    "packed": Row("134 M, packed rows, 4 x 512", packing=True, batch=4, context=512, steps=8),
    "single": Row("134 M, one sample a row, 16 x up to 512", packing=False, batch=16, context=512, steps=8),
}
GPU_ROWS = {
    "8b-gpu": Row("8 B, packed, 1 x 16,384", True, 1, 16_384, 12, _LLAMA_8B, "cuda"),
    "8b-gpu-recompute": Row("8 B, packed, 1 x 16,384, recomputation", True, 1, 16_384, 12, _LLAMA_8B, "cuda", True),
    "8b-gpu-short": Row("8 B, packed, 2 x 2,048, recomputation", True, 2, 2048, 12, _LLAMA_8B, "cuda", True),
}


@dataclass(frozen=True)
class Result:
    tokens_per_s: float
    memory_mb: float


def prepare(folder: Path, row: Row) -> None:
    """The base, with a tokenizer, and records cut from Python's own sources. In a process of its own, whose memory
    nobody counts."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from launcher.sharding import tokenize
    from llmtrain.config.data_sections import DataSection, TrainedTokenizer
    from tests.support.data import python_sources

    texts = [path.read_text() for path in python_sources(60)]
    torch.manual_seed(0)
    with torch.device(row.device):
        base = AutoModelForCausalLM.from_config(LlamaConfig(**row.base), dtype=torch.bfloat16)
    base.save_pretrained(str(folder / "base"))
    tokenize.prepare(DataSection(tokenizer=TrainedTokenizer(vocab_size=8192)), folder / "base", texts)
    whole, records, at = "".join(texts), [], 0
    for number in range(2000):
        prompt, completion = 100 + 37 * number % 700, 20 + 53 * number % 300
        records.append({"prompt": whole[at : at + prompt], "completion": whole[at + prompt : at + prompt + completion]})
        at = (at + prompt + completion) % (len(whole) - 2000)
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def run_process(command: list[str], folder: Path, extra: dict[str, str]) -> tuple[str, float]:
    """Standard output and peak memory in MB."""
    environment = {**os.environ, **extra, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with (folder / "output").open("w+") as output, (folder / "errors").open("w+") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=environment, cwd=folder)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        output.seek(0)
        errors.seek(0)
        if status:
            raise RuntimeError(f"{' '.join(command)[:300]}\n{errors.read()[-3000:]}")
        return output.read(), usage.ru_maxrss * 1024 / 1e6


def run_ours(folder: Path, row: Row, name: str) -> Result:
    shards = folder / f"shards-{row.context}-{row.packing}"
    settings = [
        "model.kind=qlora", f"model.base={folder}/base", f"model.context={row.context}", f"model.lora.r={_RANK}",
        f"data.sources=[{{kind: jsonl, paths: ['{folder}/records.jsonl']}}]", "data.format.kind=completion",
        f"data.packing={'bestfit' if row.packing else 'none'}", f"data.dir={shards}",
        f"run.name={name}", f"train.device={row.device}", "train.precision=bf16",
        f"train.global_batch_size={row.batch}", f"train.steps={row.steps}",
        f"train.micro_batch_size={row.batch}", "evaluate={every_steps: null, also_at: [], train_rows: 0}",
        "checkpoint.every_steps=null", "log.every_steps=1", "optim.schedule.warmup_steps=0",
        f"train.activation_checkpointing={json.dumps(row.recompute)}",
    ]  # fmt: skip
    if not (shards / "manifest.json").exists():
        run_process([sys.executable, "-m", "launcher", "shard", *settings], folder, {})
    _, memory = run_process([sys.executable, "-m", "llmtrain", *settings], folder, {})
    manifest = json.loads((shards / "manifest.json").read_text())["splits"]["train"]
    steps = from_events(folder / "runs" / name / "tensorboard")
    tokens = row.batch * manifest["tokens"] / manifest["rows"]
    return Result(tokens / statistics.median(steps.times_ms[_WARM_UP:]) * 1e3, steps.gpu_memory_mb or memory)


def run_trl(folder: Path, row: Row, python: str, extra: dict[str, str]) -> Result:
    job = {
        "base": str(folder / "base"), "records": str(folder / "records.jsonl"), "batch": row.batch,
        "context": row.context, "steps": row.steps, "packing": row.packing, "r": _RANK,
        "device": row.device, "recompute": row.recompute,
    }  # fmt: skip
    said, memory = run_process([python, str(ROOT / "benchmarks/worker_trl.py"), json.dumps(job)], folder, extra)
    found = json.loads(said.splitlines()[-1])
    tokens, times = found["tokens"][_WARM_UP:], found["step_ms"][_WARM_UP:]
    return Result(statistics.mean(tokens) / statistics.median(times) * 1e3, found["gpu_memory_mb"] or memory)


def run_row(folder: Path, key: str, row: Row, python: str, rounds: int) -> str:
    """The table as markdown."""
    folder /= str(row.base["hidden_size"])
    if not folder.exists():
        folder.mkdir()
        subprocess.run([sys.executable, "-m", "benchmarks.qlora", "--prepare", str(folder), key], cwd=ROOT, check=True)
    peers: dict[str, dict[str, str]] = {"TRL": {}}
    if row.device == "cpu":
        peers["TRL with our allocator settings"] = SETTINGS
    results: dict[str, list[Result]] = {name: [] for name in ("llmtrain", *peers)}
    for number in range(rounds):
        results["llmtrain"].append(run_ours(folder, row, f"{key}-{number}"))
        for name, extra in peers.items():
            results[name].append(run_trl(folder, row, python, extra))
    speed = {name: statistics.median(r.tokens_per_s for r in found) for name, found in results.items()}
    memory = {name: statistics.median(r.memory_mb for r in found) for name, found in results.items()}
    lines = [
        f"| Llama, nf4, LoRA r {_RANK}, bf16, {row.title} | tokens/s (range) | ours / it | peak memory | ours / it |",
        "|---|---|---|---|---|",
    ]
    for name, found in results.items():
        lines.append(
            f"| {name} | {with_range([r.tokens_per_s for r in found])} | {speed['llmtrain'] / speed[name]:.2f} | "
            f"{memory[name]:,.0f} MB | {memory['llmtrain'] / memory[name]:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["--prepare"]:
        prepare(Path(sys.argv[2]), (ROWS | GPU_ROWS)[sys.argv[3]])
        return
    rows = machine.choose_rows(sys.argv[1:], ROWS, GPU_ROWS)
    rounds = int(os.environ.get("ROUNDS", "3"))
    python = python_of("trl")
    if python is None:
        sys.exit("TRL could not be installed")
    print(f"{machine.with_limits()}; {rounds} rounds\n")
    with tempfile.TemporaryDirectory(dir=os.environ.get("SCRATCH")) as scratch:
        for name, row in rows.items():
            print(run_row(Path(scratch), name, row, python, rounds), flush=True)


if __name__ == "__main__":
    main()
