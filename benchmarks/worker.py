"""One peer trains a few steps and prints one JSON line: milliseconds of each step, last loss.

Runs in the peer's own environment, so it imports nothing of this project. All get the same rows of tokens, the same
batch, AdamW with the same settings; dropout as the row says.
"""

import json
import sys
import time
from typing import Any

import numpy as np
import torch


def main() -> None:
    job: dict[str, Any] = json.loads(sys.argv[1])
    rows = torch.from_numpy(np.load(job["rows"]).astype(np.int64))
    ends: list[float] = [time.perf_counter()]
    losses: list[float] = []
    first_at: list[float] = []

    def step_done(loss: float) -> None:
        ends.append(time.perf_counter())
        first_at.append(time.time())
        losses.append(loss)

    torch.manual_seed(123)
    last = globals()[f"run_{job['peer']}"](job, rows, step_done)
    times = [1e3 * (b - a) for a, b in zip(ends, ends[1:])]  # noqa: B905, RUF007  older Pythons run this too
    on_gpu = job["device"] == "cuda"
    said = {
        "step_ms": times, "loss": losses[-1] if last is None else last, "first_at": first_at[0],
        "gpu_memory_mb": torch.cuda.max_memory_allocated() / 1e6 if on_gpu else None,
    }  # fmt: skip
    print(json.dumps(said))


def batch_of(job: dict[str, Any], rows: torch.Tensor, step: int) -> torch.Tensor:
    first = step * job["batch"]
    return rows[torch.arange(first, first + job["batch"]) % len(rows)]


def run_lecture(job: dict[str, Any], rows: torch.Tensor, step_done: Any) -> None:
    """The package's own model and the statements of its `train_model_simple`."""
    from llms_from_scratch.ch04 import GPTModel
    from llms_from_scratch.ch05 import calc_loss_batch

    m = job["model"]
    config = {
        "vocab_size": job["vocab_size"], "context_length": m["context"], "emb_dim": m["width"],
        "n_heads": m["num_heads"], "n_layers": m["num_layers"], "drop_rate": m["dropout"], "qkv_bias": False,
    }  # fmt: skip
    model = GPTModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1)
    model.train()
    for step in range(job["steps"]):
        batch = batch_of(job, rows, step)
        optimizer.zero_grad()
        loss = calc_loss_batch(batch[:, :-1], batch[:, 1:], model, torch.device("cpu"))
        loss.backward()
        optimizer.step()
        step_done(loss.item())


def run_hf(job: dict[str, Any], rows: torch.Tensor, step_done: Any) -> float:
    """Hugging Face's Trainer with GPT-2, as shipped."""
    import tempfile

    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    m, on_gpu = job["model"], job["device"] == "cuda"
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=job["vocab_size"], n_positions=m["context"], n_embd=m["width"], n_layer=m["num_layers"],
            n_head=m["num_heads"], resid_pdrop=m["dropout"], embd_pdrop=m["dropout"], attn_pdrop=m["dropout"],
        )
    )  # fmt: skip

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()  # ours reads its loss at every step
            step_done(0.0)

    kept: list[torch.Tensor] = []

    class KeepsLoss(Trainer):
        def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
            kept[:] = [super().training_step(*arguments, **named)]
            return kept[0]

    # The Trainer shifts the labels itself: both get `context` tokens in and context - 1 (ours: context) targets.
    data = [{"input_ids": row[:-1], "labels": row[:-1]} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=job["batch"], max_steps=job["steps"],
            bf16=job["precision"] == "bf16", use_cpu=not on_gpu, torch_compile=on_gpu, learning_rate=4e-4,
            weight_decay=0.1, report_to=[],
            save_strategy="no", logging_steps=1000, disable_tqdm=True,
        )  # fmt: skip
        trainer = KeepsLoss(model, arguments, train_dataset=data, callbacks=[Clock()])
        trainer.train()
    return float(kept[-1])


def litgpt_model(job: dict[str, Any]) -> torch.nn.Module:
    """litgpt's GPT in GPT-2's shape."""
    from litgpt import GPT, Config

    m = job["model"]
    return GPT(
        Config(
            block_size=m["context"], vocab_size=job["vocab_size"], padded_vocab_size=job["vocab_size"],
            n_layer=m["num_layers"], n_head=m["num_heads"], n_embd=m["width"], rotary_percentage=1.0,
            parallel_residual=False, bias=True, norm_class_name="LayerNorm", mlp_class_name="GptNeoxMLP",
        )
    )  # fmt: skip


def run_litgpt(job: dict[str, Any], rows: torch.Tensor, step_done: Any) -> None:
    """litgpt's GPT (GPT-2's shape) with the statements of its pretraining loop: autocast, chunked loss, AdamW."""
    from litgpt.utils import chunked_cross_entropy

    model = litgpt_model(job)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1)
    for step in range(job["steps"]):
        batch = batch_of(job, rows, step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = chunked_cross_entropy(model(batch[:, :-1]), batch[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step_done(loss.item())


def run_lightning(job: dict[str, Any], rows: torch.Tensor, step_done: Any) -> None:
    """Lightning's Trainer around litgpt's GPT, in its bf16 mixed precision, as shipped but for logs and checkpoints."""
    import lightning as L
    from litgpt.utils import chunked_cross_entropy

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = litgpt_model(job)

        def training_step(self, batch: Any, number: int) -> Any:
            return chunked_cross_entropy(self.model(batch[0][:, :-1]), batch[0][:, 1:])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.model.parameters(), lr=4e-4, weight_decay=0.1)

        def on_train_batch_end(self, outputs: Any, batch: Any, number: int) -> None:
            step_done(float(outputs["loss"]))

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows), batch_size=job["batch"])
    L.Trainer(
        accelerator="cpu", precision="bf16-mixed", max_steps=job["steps"], max_epochs=99,
        gradient_clip_val=1.0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Module(), data)  # fmt: skip


if __name__ == "__main__":
    main()
