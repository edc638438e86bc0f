"""Every setting, its type, its default and its meaning.

The defaults are a complete run: a small GPT on the Python standard library's own sources.
Editors read the same text through the JSON schema that `llmtrain schema` prints
(`configs/schema.json`).

A field marked `MAY_CHANGE` can differ when a run is resumed. Every other difference is refused,
because it would change which samples are seen or what is computed from them.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from llmtrain import files
from llmtrain.config.data_sections import DataSection
from llmtrain.config.model_sections import QLORA_DEFAULTS, GPTModel, Model
from llmtrain.config.section import MAY_CHANGE, RUN_NAME, Folder, Section
from llmtrain.config.service_sections import HubSection, ServiceSection


class RunSection(Section):
    name: Annotated[str, Field(pattern=RUN_NAME, max_length=100, json_schema_extra=MAY_CHANGE)] = "stdlib-gpt"
    """Name of the run; its folder is DIR/NAME. At most 100 letters (A to Z, a to z), digits, ".", "_" and "-"; it
    begins with a letter or a digit."""
    dir: Annotated[Folder, Field(json_schema_extra=MAY_CHANGE)] = "runs"
    """Folder that holds all runs."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 123
    """Decides the initial weights, the order of the samples and dropout."""
    resume: Annotated[Literal["auto", "never", "must"], Field(json_schema_extra=MAY_CHANGE)] = "auto"
    """auto: resume from the newest intact checkpoint, or start. never: move an existing run folder aside
    and start from scratch. must: fail where there is no checkpoint."""

    @field_validator("dir")
    @classmethod
    def _can_be_written_down(cls, text: str) -> str:
        if "\0" in text or not files.is_utf8(text):
            raise ValueError("is no path in UTF-8")
        return text

    @property
    def folder(self) -> Path:
        """DIR/NAME, for `RunDir`."""
        return Path(self.dir) / self.name


class ScheduleSection(Section):
    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up. wsd: constant, then a linear decay over the last `decay_share`."""
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    """Steps of linear increase from 0 to `optim.lr`."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Learning rate at the end, as a share of `optim.lr`."""
    decay_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """wsd only: share of all steps spent decaying."""


class OptimSection(Section):
    kind: Literal["adamw", "muon", "adamw8bit", "paged_adamw8bit"] = "adamw"
    """adamw: torch's fused one. muon: from scratch alone; Muon for the blocks' matrices, AdamW for the rest; needs
    fewer steps for the same loss, with AdamW's weight decay and learning rate, or up to four times that. adamw8bit:
    bitsandbytes', whose two moments take a quarter of the memory. paged: they move to host memory when a GPU is full
    (on other devices the same as adamw8bit)."""
    lr: Annotated[float, Field(gt=0)] = 2e-3
    """Peak learning rate."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    """AdamW's decay rates of the two moments."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """muon only: how much of the last steps' gradients stays in the update."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay (AdamW)."""
    decay: Literal["matrices", "all"] = "matrices"
    """matrices: no weight decay on biases and LayerNorms. all: uniform, as the plain torch loop does."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global gradient norm; null for no clipping."""
    schedule: ScheduleSection = ScheduleSection()


class TrainSection(Section):
    steps: Annotated[int | None, Field(ge=1, json_schema_extra=MAY_CHANGE)] = None
    """Length in optimizer steps. Set one of steps, epochs and tokens; without any it is 300 steps."""
    epochs: Annotated[float | None, Field(gt=0, json_schema_extra=MAY_CHANGE)] = None
    """Length in passes over the training split."""
    tokens: Annotated[int | None, Field(ge=1, json_schema_extra=MAY_CHANGE)] = None
    """Length in training tokens (rows x context)."""
    global_batch_size: Annotated[int, Field(ge=1)] = 32
    """Rows per optimizer step over all ranks, whatever their number."""
    micro_batch_size: Annotated[int | None, Field(ge=1, json_schema_extra=MAY_CHANGE)] = None
    """Rows per forward pass on one rank; the rest is gradient accumulation. By default the largest
    that divides evenly and holds at most 16,384 tokens."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: autocast with fp32 weights and optimizer. auto: bf16 where the hardware is fast at it, and what the run
    began in where it resumes."""
    device: Annotated[Literal["auto", "cuda", "mps", "cpu"], Field(json_schema_extra=MAY_CHANGE)] = "auto"
    """auto: a GPU if there is one, else Apple's MPS, else the CPU."""
    compile: Annotated[bool, Field(json_schema_extra=MAY_CHANGE)] = False
    """Compile the model with torch.compile: for GPUs, after minutes of start-up. On CPUs it gains with small models
    alone. Ranks sum their gradients after the backward pass then, not during it."""
    activation_checkpointing: Annotated[bool, Field(json_schema_extra=MAY_CHANGE)] = False
    """Keep only each layer's input and recompute the rest in the backward pass: a third more
    arithmetic, a fraction of the memory, the same numbers."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        given = [name for name in ("steps", "epochs", "tokens") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both set; keep one (the others null)")
        if self.epochs is not None and not math.isfinite(self.epochs):
            raise ValueError("epochs must be a finite number")
        return self


class SampleSection(Section):
    prompt: str = "def main("
    """Text that the model continues after an evaluation (of instructions and chats: that it is asked, in the template
    of `data.format`); empty for no samples."""
    tokens: Annotated[int, Field(ge=1)] = 50
    """Length of a sample, in tokens; it is shorter where the model ends the text before."""
    temperature: Annotated[float, Field(ge=0)] = 0.8
    """0 always takes the likeliest token."""
    top_k: Annotated[int, Field(ge=1)] | None = 50
    """Draw among the k likeliest tokens; null: all."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Draw among the likeliest tokens whose probabilities together reach p; null: all."""
    every: Literal["evaluation", "epoch"] = "evaluation"
    """When to write a sample: after each evaluation, or once an epoch."""


class TaskSection(Section):
    """Answers to held-out prompts, generated and compared, at each save, and before the first step where
    `evaluate.also_at` has 0 (format.kind other than text)."""

    samples: Annotated[int, Field(ge=0)] = 0
    """Held-out prompts to answer, from all over the split, without randomness; 0 for none."""
    max_tokens: Annotated[int, Field(ge=1)] = 64
    """Longest answer."""


class EvaluateSection(Section):
    every_steps: Annotated[int | None, Field(ge=1)] = 50
    """Held-out loss every so many steps (and at every save); null for saves alone."""
    also_at: list[Annotated[int, Field(ge=0)]] = [0]
    """Further steps to evaluate after; 0 is before the first one."""
    train_rows: Annotated[int, Field(ge=0)] = 64
    """Score this many rows of the training split, evenly spread over it, in the same way each time (no dropout), so
    that the gap to the held-out loss compares like with like; 0 for none."""
    batch_size: Annotated[int | None, Field(ge=1)] = None
    """Rows per forward pass on a rank; by default the training micro-batch. Does not change the result (int8: by what
    it rounds)."""
    sample: SampleSection = SampleSection()
    task: TaskSection = TaskSection()


class CheckpointSection(Section):
    every_steps: Annotated[int | None, Field(ge=1)] = 100
    """A checkpoint every so many steps; the end of a run and a stop always save."""
    every_epochs: Annotated[float | None, Field(gt=0)] = None
    """A checkpoint at the end of every so many passes over the data."""
    keep_last: Annotated[int, Field(ge=1)] = 2
    """Keep the newest so many whole checkpoints."""
    keep_best: Annotated[int, Field(ge=0)] = 2
    """Also keep so many with the lowest held-out loss."""
    keep_every: Annotated[int | None, Field(ge=1)] = None
    """Also keep every checkpoint whose step is a multiple of this. The service deletes all others, once they are scored
    and, with `hub.repo`, uploaded."""
    background: bool = True
    """Copy to host memory, and train on while a thread writes. false: no copy, training waits for
    the disk."""


class LogSection(Section):
    every_steps: Annotated[int, Field(ge=1)] = 10
    """Read the loss from the device and write TensorBoard every so many steps."""
    tensorboard: bool = True
    """Write event files to RUN/tensorboard."""
    report: bool = True
    """Draw curve.png and write the page of `llmtrain report` at the end of the run (a few seconds)."""


class StrategySection(Section):
    kind: Literal["ddp", "zero2"] = "ddp"
    """How ranks share the work. ddp: every rank holds the model and the optimizer's state. zero2: DeepSpeed's
    ZeRO-2, every rank holds the model and its share of gradients and optimizer state; for models whose
    optimizer state does not fit. A run can change between them when it is resumed."""
    bucket_mb: Annotated[float, Field(gt=0)] = 25.0
    """Gradients are reduced in buckets of this size, during the backward pass."""
    overlap: bool = True
    """zero2 only: reduce a bucket while the next one fills, which takes a second bucket of memory. ddp
    always does."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """zero2 only. cpu: optimizer state and step in host memory; the GPU keeps weights and gradients."""
    timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """A collective that takes longer ends the run."""


class RunConfig(Section):
    """A run of llmtrain. Every key is optional: the defaults train a small GPT on Python's own sources."""

    run: RunSection = RunSection()
    data: DataSection = DataSection()
    model: Model = GPTModel()
    train: TrainSection = TrainSection()
    optim: OptimSection = OptimSection()
    evaluate: Annotated[EvaluateSection, Field(json_schema_extra=MAY_CHANGE)] = EvaluateSection()
    checkpoint: Annotated[CheckpointSection, Field(json_schema_extra=MAY_CHANGE)] = CheckpointSection()
    service: Annotated[ServiceSection, Field(json_schema_extra=MAY_CHANGE)] = ServiceSection()
    hub: Annotated[HubSection, Field(json_schema_extra=MAY_CHANGE)] = HubSection()
    log: Annotated[LogSection, Field(json_schema_extra=MAY_CHANGE)] = LogSection()
    strategy: Annotated[StrategySection, Field(json_schema_extra=MAY_CHANGE)] = StrategySection()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_kind(cls, values: Any) -> Any:
        """`model.num_layers=2` alone means a GPT; a quantised base brings its tokenizer and other defaults."""
        if not isinstance(values, dict):
            return values
        model, data = values.get("model"), values.get("data", {})
        if isinstance(data, dict) and isinstance(data.get("format"), dict) and data["format"].get("kind") != "text":
            values = _with_default(values, "data.packing", "bestfit")
        if not isinstance(model, dict):
            return values
        if model.get("kind", "gpt") != "qlora":
            values = {**values, "model": {"kind": "gpt", **model}}
            if isinstance(start := model.get("start_from"), str):
                values = _with_default(values, "data.tokenizer", {"kind": "folder", "path": start})
            return values
        for dotted, value in QLORA_DEFAULTS.items():
            values = _with_default(values, dotted, value)
        return _with_default(values, "data.tokenizer", _tokenizer_of(model))

    @model_validator(mode="after")
    def _parts_fit_each_other(self) -> Self:
        if self.strategy.kind == "zero2" and self.optim.kind != "adamw":
            raise ValueError(f"optim.kind={self.optim.kind} works with strategy.kind=ddp alone; use one or the other")
        if self.model.kind == "qlora":
            if self.optim.kind == "muon":
                raise ValueError("optim.kind=muon trains from scratch alone; with LoRA use adamw or adamw8bit")
            if self.strategy.kind == "zero2" and self.model.lora.dtype == "bf16":
                raise ValueError(
                    "model.lora.dtype=bf16 works with strategy.kind=ddp alone (ZeRO-2 keeps fp32 masters); use fp32"
                )
            if self.train.precision == "bf16" and self.model.compute_dtype == "fp32":
                raise ValueError("model.compute_dtype=fp32 needs train.precision=fp32: bf16 means bf16 arithmetic")
        if self.service.start == "never":
            if self.hub.repo is not None:
                raise ValueError("hub.repo needs the checkpoint service: set service.start to auto or manual")
            if self.service.patience is not None:
                raise ValueError("service.patience needs the checkpoint service: set service.start to auto or manual")
        if self.evaluate.task.samples and self.data.format.kind == "text":
            raise ValueError("evaluate.task.samples needs samples with completions: set data.format.kind")
        return self


def _with_default(values: dict[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    """`values` with the key set where it is absent; sections that are no mappings are left to validation."""
    name, _, rest = dotted.partition(".")
    if not rest:
        return values if name in values else {**values, name: value}
    inner = values.get(name, {})
    return {**values, name: _with_default(inner, rest, value)} if isinstance(inner, dict) else values


def _tokenizer_of(model: dict[str, Any]) -> dict[str, Any]:
    """The base's own tokenizer: from its folder, or from the Hub."""
    base = str(model.get("base", ""))
    if Path(files.expand_home(base)).is_dir():
        return {"kind": "folder", "path": base}
    return {"kind": "hub", "name": base, "revision": model.get("revision")}
