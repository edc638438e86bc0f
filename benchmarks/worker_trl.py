"""TRL's SFTTrainer with peft, as shipped, in an environment of its own; prints one JSON line.

Milliseconds of each step, and the tokens (without padding) of each.
"""

import json
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer


def main() -> None:
    job: dict[str, Any] = json.loads(sys.argv[1])
    torch.manual_seed(123)
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        job["base"], dtype=torch.bfloat16, quantization_config=quantised, device_map={"": job["device"]}
    )
    on_gpu = job["device"] == "cuda"
    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    tokenizer.pad_token = tokenizer.eos_token
    ends: list[float] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if not ends:
                ends.append(time.perf_counter())

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()  # ours reads its loss at every step
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder, per_device_train_batch_size=job["batch"], max_steps=job["steps"], bf16=True,
            use_cpu=not on_gpu, learning_rate=2e-4, report_to=[], save_strategy="no", logging_steps=1,
            disable_tqdm=True, packing=job["packing"], max_length=job["context"],
            gradient_checkpointing=job["recompute"], max_grad_norm=1.0, dataloader_num_workers=0,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=load_dataset("json", data_files=job["records"], split="train", cache_dir=folder),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=job["r"],
                lora_alpha=2 * job["r"],
                lora_dropout=0.0,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
            callbacks=[Clock()],
        )
        collate = trainer.data_collator

        def counted(examples: list[Any]) -> Any:
            batch = collate(examples)
            mask = batch.get("attention_mask")
            tokens.append(int(batch["input_ids"].numel() if mask is None else mask.sum()))
            return batch

        trainer.data_collator = counted
        trainer.train()
    times = [1e3 * (b - a) for a, b in zip(ends, ends[1:])]  # noqa: B905, RUF007
    memory_mb = torch.cuda.max_memory_allocated() / 1e6 if on_gpu else None
    print(json.dumps({"step_ms": times, "tokens": tokens[: len(times)], "gpu_memory_mb": memory_mb}))


if __name__ == "__main__":
    main()
