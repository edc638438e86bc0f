"""From raw text to a merged, fine-tuned model, as a user does it; nothing is downloaded."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain import errors, files, manifest
from tests.support.data import shared
from tests.support.runs import TIMEOUT_S, Workplace, environment

PRETRAINING = """
run: {name: base}
data: {dir: corpus, tokenizer: {kind: train, vocab_size: 1024, train_bytes: 500000}}
model: {num_layers: 3, num_heads: 4, width: 192, context: 320}
train: {steps: 60, global_batch_size: 16}
evaluate: {every_steps: null, also_at: [], train_rows: 0, sample: {prompt: ""}}
checkpoint: {every_steps: null}
service: {start: never}
log: {report: false}
"""
TUNING = """
run: {name: tuned}
model: {kind: qlora, base: exported, context: 320, lora: {r: 16, dropout: 0.05}}
data:
  dir: shards
  sources: [{kind: json, paths: [RECORDS]}]
  format: {kind: instruction}
  split: {heldout: 0.1}
train: {epochs: 3, global_batch_size: 4}
optim: {lr: 5e-3, schedule: {warmup_steps: 5}}
evaluate: {every_steps: null, train_rows: 0}
checkpoint: {every_steps: null}
service: {start: never}
log: {report: false}
"""
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName a colour.\n\n### Response:\n"
)


def llmtrain(folder: Path, *words: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "launcher", *words],
        cwd=folder, env=environment(), text=True, capture_output=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def tuning(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A small GPT pretrained on the embedded corpus, exported, and a configuration that tunes it."""
    records = shared("instruction-data.json")
    folder = tmp_path_factory.mktemp("tuning")
    (folder / "config.yaml").write_text(PRETRAINING)
    workplace = Workplace(folder)
    workplace.train()
    said = llmtrain(folder, "export", "runs/base", "exported")
    assert "transformers' forward pass moved the logits by" in said
    workplace.config.write_text(TUNING.replace("RECORDS", str(records)))
    return workplace


@pytest.mark.parametrize("quantisation", ["nf4", pytest.param("int8", marks=pytest.mark.soak)])
def test_a_quantised_base_learns_instructions(tuning: Workplace, quantisation: str):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    base = {path.name: files.sha256(path) for path in (tuning.folder / "exported").iterdir()}
    asked = ["evaluate.task.samples=2", "evaluate.also_at=[0,3]"]
    output = tuning.train(f"run.name={quantisation}", f"model.quantisation={quantisation}", *asked)
    assert "keep apart" in output
    heldout = tuning.ledger(quantisation, "heldout")
    print(f"{quantisation}: held-out loss {heldout[0]['loss']:.3f} -> {heldout[-1]['loss']:.3f}")
    assert heldout[-1]["loss"] < 0.8 * heldout[0]["loss"]
    (checkpoint,) = (tuning.run_folder(quantisation) / "checkpoints").iterdir()
    saved = manifest.read(checkpoint).train_state.step
    assert [r["step"] for r in heldout] == [0, 3, saved]
    answered = {r["step"]: r["task_exact_match"] for r in heldout if "task_exact_match" in r}
    assert answered.keys() == {0, saved}
    assert {*answered.values()} <= {0, 0.5, 1}
    assert {path.name: files.sha256(path) for path in (tuning.folder / "exported").iterdir()} == base

    adapter = checkpoint / "model"
    assert sorted(path.name for path in adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    ids = torch.randint(1024, (2, 30), generator=torch.Generator().manual_seed(0))
    theirs: Any = AutoPeftModelForCausalLM.from_pretrained(str(adapter), dtype=torch.float32)
    said = llmtrain(
        tuning.folder, "export", f"runs/{quantisation}", f"merged-{quantisation}", "--merge", "--dtype", "fp32"
    )
    assert "within the tolerance of 1e-04" in said
    merged = AutoModelForCausalLM.from_pretrained(tuning.folder / f"merged-{quantisation}", dtype=torch.float32)
    with torch.no_grad():
        difference = merged.eval()(input_ids=ids).logits - theirs.eval()(input_ids=ids).logits
    assert difference.abs().max() < 1e-3
    assert not list(tuning.folder.glob(".writing-*"))

    generate = ["generate", f"runs/{quantisation}", "--tokens", "12", "--temperature", "0", "--device", "cpu"]
    whole = llmtrain(tuning.folder, *generate, "--raw", "--prompt", PROMPT)
    assert whole.startswith(PROMPT)
    assert llmtrain(tuning.folder, *generate, "--prompt", "Name a colour.") == whole.removeprefix(PROMPT)


def test_exports_that_cannot_be(tuning: Workplace):
    assert "is a whole model, not an adapter" in llmtrain(
        tuning.folder, "export", "runs/base", "again", "--merge", code=errors.ConfigError.exit_code
    )
    assert "exported exists already" in llmtrain(
        tuning.folder, "export", "runs/base", "exported", code=errors.ConfigError.exit_code
    )
    assert "no model here" in llmtrain(tuning.folder, "export", "corpus", "x", code=errors.CheckpointError.exit_code)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["model.lora.target_modules=[q_proj]"],
            "q_proj matches nothing; did you mean c_proj? GPT2LMHeadModel has: c_attn, c_proj, c_fc",
        ),
        (["model.context=512"], "longer than the base was made for (320 positions)"),
        (["model.base=nowhere/at-all"], "its configuration cannot be loaded"),
    ],
)
def test_a_base_that_cannot_be_used_is_refused_before_anything_is_made(
    tuning: Workplace, settings: list[str], message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    output = tuning.train("run.name=wrong", *settings, code=errors.ModelError.exit_code)
    assert message in output
    assert "Traceback" not in output
    assert not tuning.run_folder("wrong").exists()


def test_a_tokenizer_larger_than_the_base_is_refused_before_hours_of_sharding(tuning: Workplace):
    tokenizer = shared("gpt2")
    settings = [f"data.tokenizer.path={tokenizer}", "data.dir=gpt2-shards"]
    output = tuning.train("run.name=wrong", *settings, code=errors.ModelError.exit_code)
    message = "the tokenizer has 50,257 tokens, but the base's embedding only 1,024 rows"
    assert message in output
    assert not tuning.run_folder("wrong").exists()
    assert not (tuning.folder / "gpt2-shards").exists()
    planned = llmtrain(tuning.folder, "plan", str(tuning.config), *settings, code=errors.ModelError.exit_code)
    assert message in planned


def test_plan_counts_the_course_run(tmp_path: Path):
    configs = Path(__file__).parents[2] / "configs"
    words = [
        str(configs / "llama-price.yaml"),
        "--samples",
        "400000",
        "--base-config",
        str(configs / "shapes/llama-3.1-8b"),
    ]
    said = llmtrain(tmp_path, "plan", *words, "--gpu-memory", "40")
    assert "steps        100,000, " in said
    assert "fits         DDP takes" in said
    for part in ("base", "embeddings", "LoRA", "gradients", "optimizer", "activations", "loss", "runtime"):
        assert f" {part} " in said
    assert "too large    DDP takes" in llmtrain(tmp_path, "plan", *words, "--gpu-memory", "12", code=3)
    packed = llmtrain(tmp_path, "plan", *words, "data.packing=bestfit", code=errors.ConfigError.exit_code)
    assert "a row holds several samples" in packed


@pytest.mark.soak
def test_the_plans_estimate_is_near_the_measured_peak(tmp_path: Path):
    import os

    from tests.support.bases import write_llama

    shape = {"hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 8, "num_attention_heads": 12}
    write_llama(tmp_path / "llama", **shape, num_key_value_heads=4)
    records = [{"prompt": f"Count from {i}:" + " word" * 40, "completion": " yes" * 20} for i in range(400)]
    (tmp_path / "records.json").write_text(json.dumps(records))
    settings = [
        "model.kind=qlora", "model.base=llama", "model.context=256", "data.format.kind=completion", "data.dir=shards",
        "data.sources=[{kind: json, paths: [records.json]}]", "train.global_batch_size=8", "train.precision=bf16",
        "run.name=peak", "train.steps=3", "evaluate.every_steps=null", "evaluate.also_at=[]", "evaluate.train_rows=0",
        "checkpoint.every_steps=2",
    ]  # fmt: skip
    llmtrain(tmp_path, "shard", *settings)  # in a process of its own
    command = [sys.executable, "-m", "llmtrain", *settings]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    assert status == 0
    measured = usage.ru_maxrss * 1024 / 1e9
    said = llmtrain(tmp_path, "plan", *settings, "--device", "cpu")
    estimated = float(said.split("fits         DDP takes ")[1].split()[0])
    print(f"estimated {estimated:.2f} GB, measured {measured:.2f} GB\n{said}")
    assert estimated == pytest.approx(measured, rel=0.15)
