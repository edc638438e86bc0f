"""What other trainers call our settings: nanoGPT, Hugging Face's Trainer, PEFT, TRL, axolotl, LLaMA-Factory, litgpt.

Looked up before spelling is: "batch_size" resembles train.micro_batch_size, and means train.global_batch_size.
"""

_BATCH = "train.global_batch_size, rows per step over all ranks"
_MICRO = "train.micro_batch_size, rows that a rank computes at once"
_ACCUMULATION = (
    "train.global_batch_size, rows per step over all ranks; as many micro-batches (train.micro_batch_size) as that "
    "takes are accumulated"
)
_STEPS, _EPOCHS, _CONTEXT = "train.steps", "train.epochs", "model.context"
_LR, _CLIP, _DECAY = "optim.lr", "optim.clip_norm", "optim.weight_decay"
_WARMUP = "optim.schedule.warmup_steps, a number of steps"
_MIN_LR = "optim.schedule.min_lr_ratio, a share of optim.lr"
_SAVE, _KEEP, _EVALUATE = "checkpoint.every_steps", "checkpoint.keep_last", "evaluate.every_steps"
_SHARE = "data.split.heldout, a share of the documents"
_HELDOUT = "data.sources, a source more with use: heldout, e.g. {kind: text, paths: [val.txt], use: heldout}"
_TEST = "data.sources, a source more with use: test (held-out text, by which checkpoints are chosen: use: heldout)"
_PRECISION = "train.precision (auto, fp32 or bf16)"
_QUANTISATION = "model.quantisation (nf4, int8 or none) under model.kind=qlora"
_FOLDER = "run.name and run.dir: a run lies in run.dir/run.name"

MEANT = {
    "batch_size": _BATCH,
    "train_batch_size": _BATCH,
    "per_device_train_batch_size": _MICRO,
    "per_device_batch_size": _MICRO,
    "gradient_accumulation_steps": _ACCUMULATION,
    "accumulate_grad_batches": _ACCUMULATION,
    "max_iters": _STEPS,
    "max_steps": _STEPS,
    "num_train_epochs": _EPOCHS,
    "num_epochs": _EPOCHS,
    "max_epochs": _EPOCHS,
    "learning_rate": _LR,
    "max_grad_norm": _CLIP,
    "grad_clip": _CLIP,
    "gradient_clip_val": _CLIP,
    "wd": _DECAY,
    "warmup_iters": _WARMUP,
    "warmup_ratio": _WARMUP,
    "min_lr": _MIN_LR,
    "lr_scheduler_type": "optim.schedule.kind",
    "lr_scheduler": "optim.schedule.kind",
    "optimizer": "optim.kind",
    "n_layer": "model.num_layers",
    "n_head": "model.num_heads",
    "num_key_value_heads": "model.num_kv_heads",
    "n_kv_heads": "model.num_kv_heads",
    "intermediate_size": "model.mlp_width",
    "head_dim": "model.head_width",
    "rms_norm_eps": "model.norm_eps",
    "n_embd": "model.width",
    "hidden_size": "model.width",
    "block_size": _CONTEXT,
    "max_seq_length": _CONTEXT,
    "max_length": _CONTEXT,
    "sequence_len": _CONTEXT,
    "cutoff_len": _CONTEXT,
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "load_in_4bit": _QUANTISATION,
    "load_in_8bit": _QUANTISATION,
    "lora_r": "model.lora.r",
    "lora_rank": "model.lora.r",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "base_model": "model.base",
    "model_name_or_path": "model.base",
    "gradient_checkpointing": "train.activation_checkpointing",
    "save_steps": _SAVE,
    "save_total_limit": _KEEP,
    "eval_steps": _EVALUATE,
    "eval_interval": _EVALUATE,
    "val_set_size": _SHARE,
    "val_size": _SHARE,
    "eval_dataset": _HELDOUT,
    "eval_file": _HELDOUT,
    "val_data": _HELDOUT,
    "val_dataset": _HELDOUT,
    "val_file": _HELDOUT,
    "validation_file": _HELDOUT,
    "validation_data": _HELDOUT,
    "test_datasets": _HELDOUT,
    "test_file": _TEST,
    "output_dir": _FOLDER,
    "out_dir": _FOLDER,
    "logging_steps": "log.every_steps",
    "resume_from_checkpoint": "run.resume; the same command again resumes by itself",
    "hub_model_id": "hub.repo",
}
"""Their name: our setting, and what else is to be known."""
