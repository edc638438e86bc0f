"""Every setting, its type, its default and its meaning.

The defaults are a complete run: a small GPT on the Python standard library's own sources.
Editors read the same text through the JSON schema that `llmtrain schema` prints
(`configs/schema.json`).

A field marked `MAY_CHANGE` can differ when a run is resumed. Every other difference is refused,
because it would change which samples are seen or what is computed from them.
"""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAY_CHANGE: dict[str, Any] = {"may_change_on_resume": True}
"""Marks a field (or a whole section) that may differ between a checkpoint and the run resuming from it."""


class Section(BaseModel):
    """Strict: unknown keys and wrong types are errors; `3` is a valid float, `"3"` is not."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class RunSection(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = "stdlib-gpt"
    """Name of the run; its folder is DIR/NAME."""
    dir: Annotated[str, Field(json_schema_extra=MAY_CHANGE)] = "runs"
    """Folder that holds all runs."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 123
    """Decides the initial weights, the order of the samples and dropout."""
    resume: Annotated[Literal["auto", "never", "must"], Field(json_schema_extra=MAY_CHANGE)] = "auto"
    """auto: go on from the newest whole checkpoint, or start. never: move an existing run folder aside
    and start anew. must: fail where there is no checkpoint."""


class StdlibSource(Section):
    kind: Literal["stdlib"] = "stdlib"
    """The Python standard library's own sources: text that every machine already has (about 30 MB)."""


class TextSource(Section):
    kind: Literal["text"]
    paths: Annotated[list[str], Field(min_length=1)]
    """Files, folders or globs (`**` allowed); folders mean all `*.txt` and `*.md` below them."""
    separator: Annotated[str, Field(min_length=1)] | None = None
    """Text between two documents of a file, e.g. "<|endoftext|>"; without it a file is one document."""
    invalid_utf8: Literal["error", "replace", "skip"] = "error"
    """What to do with a file that is not valid UTF-8."""


class JsonlSource(Section):
    kind: Literal["jsonl"]
    paths: Annotated[list[str], Field(min_length=1)]
    """Files or globs; one JSON object a line."""
    field: str = "text"
    """The object's key that holds the text."""


class CsvSource(Section):
    kind: Literal["csv"]
    paths: Annotated[list[str], Field(min_length=1)]
    """Files or globs with a header line."""
    field: str = "text"
    """The column that holds the text."""


class ParquetSource(Section):
    kind: Literal["parquet"]
    paths: Annotated[list[str], Field(min_length=1)]
    """Files or globs."""
    field: str = "text"
    """The column that holds the text."""


class HuggingFaceSource(Section):
    kind: Literal["huggingface"]
    name: str
    """A dataset's name on the Hub, or what `datasets.load_dataset` takes as its first argument
    ("json", "parquet", a local folder)."""
    config: str | None = None
    """The dataset's configuration (subset)."""
    split: str = "train"
    """The dataset's split, e.g. "train" or "train[:10%]"."""
    revision: str | None = None
    """Branch, tag or commit; pin a commit for byte-identical shards."""
    data_files: list[str] | None = None
    """Files to load, for the generic builders ("json", "csv", "parquet", "text")."""
    field: str = "text"
    """The column that holds the text."""


Source = Annotated[
    StdlibSource | TextSource | JsonlSource | CsvSource | ParquetSource | HuggingFaceSource,
    Field(discriminator="kind"),
]


class TrainedTokenizer(Section):
    kind: Literal["train"] = "train"
    """Train a byte-level BPE on the corpus' training documents."""
    vocab_size: Annotated[int, Field(ge=260, le=1_000_000)] = 8192
    train_bytes: Annotated[int, Field(ge=1)] = 20_000_000
    """Train on at most this much text, taken evenly from the corpus."""


class FolderTokenizer(Section):
    kind: Literal["folder"]
    path: str
    """A folder with tokenizer.json (Hugging Face format)."""


class HubTokenizer(Section):
    kind: Literal["hub"]
    name: str
    """A model or tokenizer on the Hugging Face Hub, e.g. "openai-community/gpt2"."""
    revision: str | None = None


Tokenizer = Annotated[TrainedTokenizer | FolderTokenizer | HubTokenizer, Field(discriminator="kind")]


class SplitSection(Section):
    by: Literal["tail", "hash"] = "hash"
    """tail: held-out and test are the last shares of the text, in order. hash: each document goes where
    its SHA-256 says, so a document keeps its split when others come or go."""
    heldout: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Share of the text used for choosing a checkpoint."""
    test: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of the text that choosing never sees; 0 for none."""

    @model_validator(mode="after")
    def _leaves_something(self) -> Self:
        if self.heldout + self.test >= 1:
            raise ValueError(
                f"heldout + test = {self.heldout + self.test:g} leaves nothing to train on; make their sum less than 1"
            )
        return self


class DataSection(Section):
    sources: Annotated[list[Source], Field(min_length=1)] = [StdlibSource()]
    """Where the text comes from, in order."""
    dir: Annotated[str | None, Field(json_schema_extra=MAY_CHANGE)] = None
    """Folder of the shards; by default shards/ and a hash of this section."""
    tokenizer: Tokenizer = TrainedTokenizer()
    split: SplitSection = SplitSection()
    packing: Literal["contiguous", "bestfit"] = "contiguous"
    """contiguous: concatenate the documents and cut every `model.context` tokens. bestfit: whole documents
    side by side in a row, split only when longer than the context, attention and positions reset at
    each document."""
    verify: Annotated[Literal["sha256", "size"], Field(json_schema_extra=MAY_CHANGE)] = "sha256"
    """What is checked when a run starts: every byte (about 1 GB/s), or the file sizes alone."""

    @model_validator(mode="before")
    @classmethod
    def _tokenizer_kind(cls, values: Any) -> Any:
        """`data.tokenizer.vocab_size=1000` alone means the default kind."""
        if isinstance(values, dict) and isinstance(values.get("tokenizer"), dict):
            values = {**values, "tokenizer": {"kind": "train", **values["tokenizer"]}}
        return values


class GPTModel(Section):
    kind: Literal["gpt"] = "gpt"
    """GPT-2's architecture. 12 layers, 12 heads, width 768 is GPT-2 small (124 M parameters tied)."""
    num_layers: Annotated[int, Field(ge=1)] = 4
    num_heads: Annotated[int, Field(ge=1)] = 4
    width: Annotated[int, Field(ge=1)] = 256
    context: Annotated[int, Field(ge=2)] = 256
    """Tokens that the model sees at once; also the length of a training row."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    qkv_bias: bool = True
    tie_weights: bool = True
    """Use the token embedding as output matrix too."""
    init: Literal["gpt2", "pytorch"] = "gpt2"
    """gpt2: N(0, 0.02), residual projections scaled by 1/sqrt(2 layers). pytorch: the layers' defaults."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.num_heads:
            fitting = [h for h in range(1, self.width + 1) if self.width % h == 0 and self.width // h >= 8]
            raise ValueError(
                f"num_heads={self.num_heads} does not divide width={self.width}; use one of "
                + ", ".join(map(str, fitting[-12:]))
            )
        return self


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
    lr: Annotated[float, Field(gt=0)] = 2e-3
    """Peak learning rate."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
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
    """bf16: autocast with fp32 weights and optimizer. auto: bf16 where the hardware is fast at it."""
    device: Annotated[Literal["auto", "cuda", "mps", "cpu"], Field(json_schema_extra=MAY_CHANGE)] = "auto"
    """auto: a GPU if there is one, else Apple's MPS, else the CPU."""
    compile: Annotated[bool, Field(json_schema_extra=MAY_CHANGE)] = False
    """Compile the model with torch.compile: faster on GPUs after a minute of start-up."""
    activation_checkpointing: Annotated[bool, Field(json_schema_extra=MAY_CHANGE)] = False
    """Keep only each layer's input and compute the rest anew in the backward pass: a third more
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
    """Text that the model continues after an evaluation; empty for no samples."""
    tokens: Annotated[int, Field(ge=1)] = 50
    temperature: Annotated[float, Field(ge=0)] = 0.8
    """0 always takes the likeliest token."""
    top_k: Annotated[int, Field(ge=1)] | None = 50
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    every: Literal["evaluation", "epoch"] = "evaluation"


class EvaluateSection(Section):
    every_steps: Annotated[int | None, Field(ge=1)] = 50
    """Held-out loss every so many steps (and at every save); null for saves alone."""
    also_at: list[Annotated[int, Field(ge=0)]] = [0]
    """Further steps to evaluate after; 0 is before the first one."""
    train_rows: Annotated[int, Field(ge=0)] = 64
    """Score this many rows of the training split in the same way each time (no dropout), so that the gap
    to the held-out loss compares like with like; 0 for none."""
    batch_size: Annotated[int | None, Field(ge=1)] = None
    """Rows per forward pass on a rank; by default the training micro-batch. Does not change the result."""
    sample: SampleSection = SampleSection()


class CheckpointSection(Section):
    every_steps: Annotated[int | None, Field(ge=1)] = 100
    """A checkpoint every so many steps; the end of a run and a stop always save."""
    every_epochs: Annotated[float | None, Field(gt=0)] = None
    """A checkpoint at the end of every so many passes over the data."""
    keep_last: Annotated[int, Field(ge=1)] = 2
    """Keep the newest so many,"""
    keep_best: Annotated[int, Field(ge=0)] = 2
    """and those with the lowest held-out loss,"""
    keep_every: Annotated[int | None, Field(ge=1)] = None
    """and every one whose step is a multiple of this. All others are deleted."""
    background: bool = True
    """Copy to host memory and go on training while a thread writes. false: no copy, training waits for
    the disk."""


class LogSection(Section):
    every_steps: Annotated[int, Field(ge=1)] = 10
    """Read the loss from the device and write TensorBoard every so many steps."""
    tensorboard: bool = True


class StrategySection(Section):
    kind: Literal["ddp", "zero2"] = "ddp"
    """How ranks share the work. ddp: every rank holds the model and the optimizer's state. zero2: DeepSpeed's
    ZeRO-2, every rank holds the model and its share of gradients and optimizer state; for models whose
    optimizer state does not fit. A run can change between them when it is resumed."""
    bucket_mb: Annotated[float, Field(gt=0)] = 25.0
    """Gradients are reduced in buckets of this size while the backward pass goes on."""
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
    model: GPTModel = GPTModel()
    train: TrainSection = TrainSection()
    optim: OptimSection = OptimSection()
    evaluate: Annotated[EvaluateSection, Field(json_schema_extra=MAY_CHANGE)] = EvaluateSection()
    checkpoint: Annotated[CheckpointSection, Field(json_schema_extra=MAY_CHANGE)] = CheckpointSection()
    log: Annotated[LogSection, Field(json_schema_extra=MAY_CHANGE)] = LogSection()
    strategy: Annotated[StrategySection, Field(json_schema_extra=MAY_CHANGE)] = StrategySection()
