"""How much memory a rank needs, counted before anything is started. No torch.

Bytes, per rank. P parameters, R ranks, N positions of a micro-batch (rows x context), D width, H heads,
L layers, V vocabulary. Weights and optimizer state are fp32; bf16 means autocast.

What a layer keeps for its backward pass was counted with `torch.autograd.graph.saved_tensors_hooks`
(tests/unit/test_memory.py counts again); what the rest takes was fitted to measured peaks
(docs/performance.md has both).
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from llmtrain.batches import BatchPlan
from llmtrain.config.model_sections import FromScratch
from llmtrain.config.schema import RunConfig

_LOSS_CHUNK = {"cpu": 512, "cuda": 4096, "mps": 4096}
_LOSS_LOGITS = 2**28
"""At most so many logits at the same time: with 128k tokens of vocabulary, chunks of 2,048 positions on a GPU."""

_ATTENTION_BLOCK = 128
"""Queries taken at a time: more of them compute more hidden scores, fewer make products small."""
_LONGEST_KEPT_ATTENTION = 1024

_RUNTIME_MB = {"cpu": 385, "cuda": 900, "mps": 600}
"""Python, torch and what a process of ours has loaded; on GPUs the CUDA context and cuBLAS workspaces."""
_COMPILER_MB = 80
"""torch's compiler on the CPU: DeepSpeed, transformers, bitsandbytes and torch's recomputation load it; a plain GPT
does not."""
_DEEPSPEED_MB = 145
"""What DeepSpeed and what it imports add on the CPU."""
FRAGMENTATION = 0.05
"""Share of all other parts that an allocator holds but cannot hand out."""

Device = Literal["cpu", "cuda", "mps"]


@dataclass(frozen=True)
class MemoryPart:
    name: str
    size_bytes: float
    note: str = ""


class Sizes(Protocol):
    """What `llmtrain plan` asks of a kind of model."""

    @property
    def title(self) -> str: ...
    @property
    def trainable(self) -> int:
        """Trainable parameters."""
        ...

    def checkpoint_bytes(self, config: RunConfig) -> float: ...
    def model_bytes(self, config: RunConfig) -> float:
        """What of a checkpoint is the model: it is uploaded."""
        ...

    def host_copy(self, config: RunConfig, ranks: int) -> float:
        """Host memory of rank 0 for saving beside training: weights and its share of the optimizer's state."""
        ...

    def estimate(
        self, config: RunConfig, plan: BatchPlan, ranks: int, kind: str, bf16: bool, device: Device
    ) -> list[MemoryPart]:
        """The parts of a rank's peak."""
        ...


def moment_bytes(config: RunConfig, size: int = 4) -> float:
    """Of AdamW's two moments of a weight of `size` bytes; in 8 bits with a scale for each block of 256."""
    return 2 + 8 / 256 if "8bit" in config.optim.kind else 2.0 * size


def loss_chunk(device: str, vocab_size: int) -> int:
    """Positions whose logits exist at the same time; models/loss.py works in chunks of this size."""
    return min(_LOSS_CHUNK.get(device, _LOSS_CHUNK["cuda"]), max(128, _LOSS_LOGITS // vocab_size))


def loss_part(
    positions: int, vocab_size: int, trained_head: int, bf16: bool, device: Device, capped: bool = False
) -> MemoryPart:
    """Logits of one chunk; of a trained output layer (`trained_head` weights) its gradient and bf16 copy."""
    chunk = min(positions, loss_chunk(device, vocab_size))
    # In bf16 there is an fp32 copy, with a cap its slopes, on CPUs of a few rows alone. The gradient takes the logits'
    # place.
    beside = 0 if device == "cpu" else 4 * bf16 + 4 * capped
    logits = chunk * vocab_size * ((2 if bf16 else 4) + beside)
    casts = 2 * trained_head if bf16 else 0
    note = f"logits of {chunk:,} positions" + (", the output layer's gradient" if trained_head else "")
    return MemoryPart("loss", logits + casts + 4 * trained_head, note)


def runtime_part(kind: str, device: Device, compiler: bool) -> MemoryPart:
    """What a process takes before it has a model; `compiler`: whether it loads torch's."""
    runtime = _RUNTIME_MB[device]
    if device == "cpu":
        runtime += _COMPILER_MB * compiler + _DEEPSPEED_MB * (kind == "zero2")
    return MemoryPart(
        "runtime", runtime * 1e6, "Python and libraries" if device == "cpu" else "CUDA context, libraries"
    )


@dataclass(frozen=True)
class WholeSizes:
    """`Sizes` of a model that is trained from scratch, whole."""

    model: FromScratch
    vocab_size: int

    @property
    def title(self) -> str:
        millions = self.trainable / 1e6
        return (
            f"{self.model.architecture}, {millions:,.1f} M parameters, {self.vocab_size:,} tokens vocabulary, "
            f"context {self.model.context:,}"
        )

    @property
    def trainable(self) -> int:
        return num_parameters(self.model, self.vocab_size)

    def checkpoint_bytes(self, config: RunConfig) -> float:
        return self.model_bytes(config) + self._optimizer_bytes(config)

    def _optimizer_bytes(self, config: RunConfig, ranks: int = 1) -> float:
        """Of a rank's optimizer state under DDP: Muon's is one momentum, divided among the ranks."""
        by_muon = self.model.num_layers * block_matrices(self.model) if config.optim.kind == "muon" else 0
        return moment_bytes(config) * (self.trainable - by_muon) + 4 * by_muon / ranks

    def model_bytes(self, config: RunConfig) -> float:
        return self.trainable * 4

    def host_copy(self, config: RunConfig, ranks: int) -> float:
        if not config.checkpoint.background:
            return 0.0
        return self.model_bytes(config) + self._optimizer_bytes(config) / ranks

    def estimate(
        self, config: RunConfig, plan: BatchPlan, ranks: int, kind: str, bf16: bool, device: Device
    ) -> list[MemoryPart]:
        """The parts of a rank's peak, which is reached in the backward pass of a step after the first."""
        model, parameters = self.model, self.trainable
        positions = plan.micro_batch_size * model.context
        head = self.vocab_size * model.width

        parts = [MemoryPart("weights", 4 * parameters, "fp32, whole on each rank")]
        if kind == "zero2":
            bucket = config.strategy.bucket_mb * 1e6
            if device == "cuda":  # strategies/zero2.py: the largest gradient fits
                bucket = max(bucket, 4 * head, 4 * model.inner_width * model.width)
            buckets = bucket * (2 if config.strategy.overlap else 1)
            parts.append(
                MemoryPart(
                    "gradients", 4 * parameters / ranks + buckets, f"1/{ranks}, and buckets of {bucket / 1e6:g} MB"
                )
            )
            offloaded = config.strategy.offload_optimizer == "cpu" and device != "cpu"
            state = 0 if offloaded else 12 * parameters / ranks
            note = "in host memory" if offloaded else f"1/{ranks} of fp32 weights and two moments"
            parts.append(MemoryPart("optimizer", state, note))
        else:
            parts.append(MemoryPart("gradients", 4 * parameters, "fp32"))
            note = "two moments, " + ("8 bits" if "8bit" in config.optim.kind else "fp32")
            if config.optim.kind == "muon":
                note += f"; of the blocks' matrices one momentum, 1/{ranks}"
            parts.append(MemoryPart("optimizer", self._optimizer_bytes(config, ranks), note))

        parts.append(_activations(model, positions, bf16, device, config.train.activation_checkpointing))
        parts.append(loss_part(positions, self.vocab_size, head, bf16, device))
        backward = 3 * 4 * model.inner_width * positions  # three gradients of an MLP's inside, fp32
        parts.append(MemoryPart("temporaries", backward, "of one layer's backward pass"))
        train = config.train
        compiler = train.compile or train.activation_checkpointing or "8bit" in config.optim.kind or kind == "zero2"
        parts.append(runtime_part(kind, device, compiler))
        lost = FRAGMENTATION * sum(part.size_bytes for part in parts)
        return [*parts, MemoryPart("fragmentation", lost, f"{FRAGMENTATION:.0%} of the above")]


def num_parameters(model: FromScratch, vocab_size: int) -> int:
    """Trainable parameters; equal to the `num_parameters()` of the model in `llmtrain.models`."""
    width = model.width
    tables = vocab_size * (1 if model.tie_weights else 2) * width
    if model.kind == "llama":
        rest = 2 * width + (2 * model.head_channels if model.qk_norm else 0)  # norms, biases
        rest += model.head_channels * (model.num_heads + 2 * model.kv_heads) if model.qkv_bias else 0
        return tables + model.num_layers * (block_matrices(model) + rest) + width
    rest = 10 * width + (3 * width if model.qkv_bias else 0)  # biases, layer norms
    return tables + model.context * width + model.num_layers * (block_matrices(model) + rest) + 2 * width


def block_matrices(model: FromScratch) -> int:
    """Weights of a block's matrices."""
    if model.kind == "gpt":
        return 12 * model.width**2
    heads = 2 * model.head_channels * (model.num_heads + model.kv_heads)
    return model.width * (heads + 3 * model.inner_width)


def keeps_probabilities(length: int, bf16: bool, dropout: float) -> bool:
    """Whether attention in training on a CPU goes through models/attention.py's own path: where it is the faster one,
    and where what it keeps, quadratic in the length, is not too much beside torch's (which with dropout keeps more)."""
    return dropout > 0 or (bf16 and length <= _LONGEST_KEPT_ATTENTION)


def attention_blocks(length: int) -> list[tuple[int, int]]:
    """The queries (first, last + 1) that models/attention.py takes together; they see the keys up to their last."""
    starts = range(0, length, _ATTENTION_BLOCK)
    return [(start, min(length, start + _ATTENTION_BLOCK)) for start in starts]


def attention_keys(length: int) -> float:
    """The keys that these blocks compute for a query, on average."""
    return sum((end - start) * end for start, end in attention_blocks(length)) / length


def layer_activations(model: FromScratch, positions: int, bf16: bool, device: Device) -> float:
    """What one transformer layer keeps for its backward pass."""
    width, length = model.width, model.context
    dropout = model.dropout if model.kind == "gpt" else 0.0
    if model.kind == "llama":
        channels = model.head_channels * model.num_heads
        kept = (
            (20 if bf16 else 24) * width + (8 if bf16 else 16) * channels + (8 if bf16 else 16) * model.inner_width + 8
        )
        if model.qk_norm:
            kept += (8 if bf16 else 12) * model.head_channels * (model.num_heads + model.kv_heads)
    else:
        kept = (36 if bf16 else 64) * width
        if bf16 and device == "cpu":  # models/projections.py recomputes layer norms and GELU
            kept -= 12 * width
        if dropout:
            kept += 4 * width  # two masks of 2 bytes
    if device == "cpu" and keeps_probabilities(length, bf16, dropout):
        kept += attention_keys(length) * model.num_heads * ((2 if bf16 else 4) + (2 if dropout else 0))
    return float(kept * positions)


def _activations(model: FromScratch, positions: int, bf16: bool, device: Device, recompute: bool) -> MemoryPart:
    layer = layer_activations(model, positions, bf16, device)
    # Autocast's copies live until the backward pass; of a GPT on CPUs attention's output layer's alone
    # (models/projections.py).
    cast = model.width**2 if device == "cpu" and model.kind == "gpt" else block_matrices(model)
    weights_bf16 = 2 * cast if bf16 else 0
    around = (12 if model.has_dropout else 8) * model.width * positions
    if recompute:
        kept = model.num_layers * 4 * model.width * positions + layer + weights_bf16 + around
        return MemoryPart("activations", kept, "each layer's input, one layer whole")
    return MemoryPart(
        "activations", model.num_layers * (layer + weights_bf16) + around, f"{model.num_layers} layers, whole"
    )
