"""Start real runs in processes of their own, small enough for a test."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.data import python_sources
from tests.support.slurm_setup import free_ports

TIMEOUT_S = 300


@dataclass(frozen=True)
class Workplace:
    """A folder with a small configuration over real text; every run in it uses the same shards."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    def command(self, *settings: str, ranks: int = 1) -> list[str]:
        start = [sys.executable, "-m", "llmtrain"]
        if ranks > 1:
            start = [*torchrun(ranks), "-m", "llmtrain"]
        return [*start, str(self.config), *settings]

    def start(self, *settings: str, ranks: int = 1, **options: Any) -> subprocess.Popen[str]:
        """A run in its own process group, with output captured together."""
        return subprocess.Popen(
            self.command(*settings, ranks=ranks),
            cwd=self.folder,
            env=environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **options,
        )

    def train(self, *settings: str, ranks: int = 1, code: int = 0) -> str:
        """Run to the end; returns the output. Fails the test on any other exit code."""
        done = subprocess.run(
            self.command(*settings, ranks=ranks),
            cwd=self.folder,
            env=environment(),
            text=True,
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        output = done.stdout + done.stderr
        assert done.returncode == code, f"exit code {done.returncode} instead of {code}:\n{output[-4000:]}"
        return output

    def run_folder(self, name: str) -> Path:
        return self.folder / "runs" / name

    def ledger(self, name: str, which: str = "metrics") -> list[dict[str, Any]]:
        text = (self.run_folder(name) / f"{which}.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def weights(self, name: str) -> bytes:
        """The bytes of the newest checkpoint's weights and optimizer."""
        newest = max((self.run_folder(name) / "checkpoints").glob("step-*"))
        return b"".join(
            path.read_bytes() for path in [newest / "model/model.safetensors", *sorted((newest / "state").iterdir())]
        )


GPT = "num_layers: 2, num_heads: 2, width: 32, context: 64, dropout: 0.1"
LLAMA = "kind: llama, num_layers: 2, num_heads: 4, num_kv_heads: 2, width: 32, context: 64"


def make_workplace(folder: Path, files: int = 6, packing: str = "contiguous", model: str = GPT) -> Workplace:
    """A small model on a few of Python's own modules, in fp32."""
    paths = ", ".join(f'"{path}"' for path in python_sources(files))
    (folder / "config.yaml").write_text(
        f"""
run: {{name: run, dir: runs}}
data:
  dir: shards
  sources: [{{kind: text, paths: [{paths}]}}]
  tokenizer: {{kind: train, vocab_size: 512}}
  split: {{by: tail, heldout: 0.1, test: 0.05}}
  packing: {packing}
model: {{{model}}}
train: {{steps: 24, global_batch_size: 8, precision: fp32}}
optim: {{lr: 3e-3, schedule: {{warmup_steps: 4}}}}
evaluate: {{every_steps: 8, train_rows: 8, sample: {{tokens: 5}}}}
checkpoint: {{every_steps: 4, keep_last: 3, keep_best: 1}}
service: {{start: never, nice: 0}}
log: {{every_steps: 1, report: false}}
"""
    )
    return Workplace(folder)


def environment() -> dict[str, str]:
    """One thread a process: results do not depend on how busy the machine is. And no GPU (tests/conftest.py)."""
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2]), "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **own}


def torchrun(ranks: int) -> list[str]:
    """The beginning of a command. One run, one port: several tests may run at the same time."""
    words = ["torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
    return [sys.executable, "-m", *words]


def free_port() -> int:
    return free_ports(1)[0]
