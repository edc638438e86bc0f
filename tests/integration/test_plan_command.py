"""`llmtrain plan`: what it says, and how near it comes to a run's real peak."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.errors import ConfigError
from tests.support.runs import LLAMA, Workplace, environment, make_workplace

NOT_ENOUGH = 3


def plan(folder: Path, *words: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "plan", *words],
        cwd=folder, env={**environment(), "COLUMNS": "120"}, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


GPT_5B = ["model.width=4096", "model.num_layers=24", "model.num_heads=32", "train.global_batch_size=512",
          "model.context=1024", "--gpus", "8", "--gpu-memory", "80", "--vocab-size", "50257"]  # fmt: skip


def test_a_model_that_does_not_fit_is_told_what_to_change(tmp_path: Path):
    said = plan(tmp_path, *GPT_5B, code=NOT_ENOUGH)
    assert "too large    DDP takes" in said
    way = next(line for line in said.splitlines() if "it fits with" in line).split("with ")[1].split()
    assert "strategy.kind=zero2" in way
    assert "fits         ZeRO-2 takes" in plan(tmp_path, *GPT_5B, *way)


def test_a_vocabulary_that_only_the_hub_knows_has_to_be_given(tmp_path: Path):
    hub = ["data.tokenizer.kind=hub", "data.tokenizer.name=openai-community/gpt2", "--device", "cpu"]
    assert "--vocab-size" in plan(tmp_path, *hub, code=ConfigError.exit_code)
    assert "50,257 tokens vocabulary" in plan(tmp_path, *hub, "--vocab-size", "50257")


def test_steps_and_epochs_come_from_the_shards(workplace: Workplace):
    workplace.train("run.name=planned", "train.steps=1")
    rows = int(
        plan(workplace.folder, str(workplace.config), "--device", "cpu").split("data")[1].split()[0].replace(",", "")
    )
    said = plan(workplace.folder, str(workplace.config), "--device", "cpu", "train.epochs=4", "train.steps=null")
    assert f"steps        {-(-4 * rows // 8):,}, " in said


def test_a_runs_own_pace_is_taken_for_what_it_computed_alone(workplace: Workplace):
    workplace.train("run.name=paced", "train.steps=1")
    words = [str(workplace.config), "--device", "cpu", "run.name=paced"]
    assert "tokens/s (as in the last start of runs/paced)" in plan(workplace.folder, *words)
    assert "had other settings (ranks=1" in plan(workplace.folder, *words, "--gpus", "2")
    assert "had other settings (train.precision=" in plan(workplace.folder, *words, "train.precision=bf16")


# Large enough that the model outweighs Python, small enough for a test: width, layers, rows, and what is special.
CONFIGURATIONS = {
    "weights": ["model.width=768", "model.num_layers=6", "model.num_heads=12", "train.global_batch_size=2"],
    "activations": ["model.width=384", "model.num_layers=8", "model.num_heads=6", "train.global_batch_size=24"],
    "dropout, bf16": ["model.width=512", "model.num_layers=6", "model.num_heads=8", "train.global_batch_size=8",
                      "model.dropout=0.1", "train.precision=bf16"],
}  # fmt: skip


LLAMAS = {
    "llama": ["model.width=512", "model.num_layers=8", "model.num_heads=8", "train.global_batch_size=8"],
    "llama, bf16, muon": ["model.width=512", "model.num_layers=8", "model.num_heads=8", "model.num_kv_heads=2",
                          "train.global_batch_size=16", "train.precision=bf16", "optim.kind=muon"],
}  # fmt: skip


def check_peak(workplace: Workplace, name: str, settings: list[str]) -> None:
    common = ["model.context=256", "data.dir=shards256", "train.steps=3", "checkpoint.every_steps=2", *settings]
    words = [str(workplace.config), *common]
    run = ["run.name=peak", "evaluate.every_steps=null", "evaluate.also_at=[]", "evaluate.train_rows=0"]
    command = [sys.executable, "-m", "llmtrain", *words, *run, "run.resume=never"]
    process = subprocess.Popen(command, cwd=workplace.folder, env=environment(), stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    assert status == 0
    measured = usage.ru_maxrss * 1024 / 1e9
    said = plan(workplace.folder, *words, "--device", "cpu")
    estimated = float(said.split("fits         DDP takes ")[1].split()[0])
    print(f"{name}: estimated {estimated:.2f} GB, measured {measured:.2f} GB")
    assert estimated == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    "name", ["weights", *(pytest.param(name, marks=pytest.mark.soak) for name in ("activations", "dropout, bf16"))]
)
def test_the_estimate_is_near_the_measured_peak(workplace: Workplace, name: str):
    check_peak(workplace, name, ["model.dropout=0.0", *CONFIGURATIONS[name]])


@pytest.mark.soak
@pytest.mark.parametrize("name", list(LLAMAS))
def test_the_estimate_of_a_llama_is_near_the_measured_peak(tmp_path: Path, name: str):
    check_peak(make_workplace(tmp_path, model=LLAMA), name, LLAMAS[name])
