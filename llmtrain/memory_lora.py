"""How much memory a rank needs to train LoRA on a quantised base, counted before anything is started. No torch.

What a layer keeps for its backward pass was counted with `torch.autograd.graph.saved_tensors_hooks` on Llama's
architecture (tests/unit/test_qlora.py counts again). Others keep more or less, measured in bf16 as a share of what is
counted here: llama, mistral, qwen2, gemma and granite 1.02; qwen3 and olmo2 1.13 (they normalise queries and keys too);
phi3 1.14; gpt2 1.15; gemma3_text 1.31; starcoder2 0.61. What a mixture's experts keep is not counted. D hidden width, I
width inside the feed-forward part, N positions of a micro-batch.
"""

from dataclasses import dataclass

from llmtrain.base_facts import BaseFacts
from llmtrain.batches import BatchPlan
from llmtrain.config.model_sections import QLoRAModel
from llmtrain.config.schema import RunConfig
from llmtrain.memory import (
    FRAGMENTATION,
    Device,
    MemoryPart,
    attention_keys,
    keeps_probabilities,
    loss_part,
    moment_bytes,
    runtime_part,
)

_LIBRARIES_MB = 330
"""What transformers, peft and bitsandbytes add to a process, on the host."""
_BLOCK, _SCALES = 64, 256
"""nf4: weights that share a scale, and scales that share one of their own."""
_PAIR = 8
"""Bytes for each pair of tokens and head where no fused kernel computes attention: capped scores, their softmax in
fp32, and that in bf16. GPT-OSS, without a cap, keeps 2 in bf16 and 4 in fp32."""


def lora_parameters(model: QLoRAModel, facts: BaseFacts) -> int:
    """Trainable parameters; equal to `QLoRA.num_parameters()`."""
    total = 0
    for linear in facts.targets(model.lora.target_modules):
        total += linear.count * (model.lora.r * (linear.inputs + linear.outputs))
        total += linear.count * linear.outputs * model.lora.dora
    return total


def weight_bytes(model: QLoRAModel, compute_bytes: int) -> float:
    """Of one weight of a quantised layer, its share of the scales included."""
    match model.quantisation:
        case "nf4" if model.double_quantisation:
            return 0.5 + 1 / _BLOCK + 4 / (_BLOCK * _SCALES)
        case "nf4":
            return 0.5 + 4 / _BLOCK
        case "int8":
            return 1.0
        case "none":
            return float(compute_bytes)


def layer_activations(config: RunConfig, model: QLoRAModel, facts: BaseFacts, bf16: bool, device: Device) -> float:
    """Bytes that one layer keeps for its backward pass, for each position."""
    size = 2 if bf16 else 4
    packed = config.data.isolates_documents  # on CPUs keys and values are then repeated for all heads
    kv = facts.hidden if packed and device != "cuda" else facts.kv_width
    kept = 2 * 4 * facts.hidden + size * (2 * facts.hidden + 2 * kv) + size * 3 * facts.inner
    int8 = model.quantisation == "int8"
    targets = facts.targets(model.lora.target_modules)
    inputs = [linear.inputs for linear in targets for _ in range(max(1, linear.count // facts.layers))]
    if model.lora.dropout and model.lora.dora:  # each adapter has an input of its own, and a mask
        kept += sum(inputs) * (size + (size if device == "cpu" else 1))
        kept += size * (2 * facts.hidden + facts.inner) * int8
    else:  # adapters and int8 layers of the same input share it; masks are drawn again
        kept += size * 2 * facts.hidden * (int8 or facts.hidden in inputs)
        kept += size * facts.inner * (int8 or facts.inner in inputs)
    if facts.keeps_scores:
        kept += _PAIR * facts.heads * model.context
    elif packed and device == "cpu":
        if keeps_probabilities(model.context, bf16, 0.0):  # as if a document filled each row
            kept += attention_keys(model.context) * facts.heads * size
        else:
            kept += size * facts.hidden  # each document's result, and all of them joined
    return float(kept)


def int8_inputs(model: QLoRAModel, facts: BaseFacts, size: int) -> int:
    """Bytes of a layer's inputs to its linear layers, for each position: int8 layers keep them beside what autograd
    keeps, out of reach of activation checkpointing (bitsandbytes 0.50, `ctx.tensors` and `ctx.A`)."""
    return size * (3 * facts.hidden + facts.inner) if model.quantisation == "int8" else 0


@dataclass(frozen=True)
class LoraSizes:
    """`memory.Sizes` of LoRA on a base."""

    model: QLoRAModel
    facts: BaseFacts

    @property
    def title(self) -> str:
        facts, lora = self.facts, self.model.lora
        total = (facts.linear_parameters + facts.other_parameters) / 1e9
        return (
            f"{facts.architecture}, {total:,.2f} G parameters, frozen in {self.model.quantisation}; LoRA of rank "
            f"{lora.r} with {self.trainable / 1e6:,.1f} M parameters, context {self.model.context:,}"
        )

    @property
    def trainable(self) -> int:
        return lora_parameters(self.model, self.facts)

    def checkpoint_bytes(self, config: RunConfig) -> float:
        weights, moments = self._adapter_bytes(config)
        return self.trainable * (weights + moments)

    def model_bytes(self, config: RunConfig) -> float:
        return self.trainable * self._adapter_bytes(config)[0]

    def host_copy(self, config: RunConfig, ranks: int) -> float:
        weights, moments = self._adapter_bytes(config)
        return self.trainable * (weights + moments / ranks) if config.checkpoint.background else 0.0

    def _adapter_bytes(self, config: RunConfig) -> tuple[float, float]:
        """Of a trainable weight, and of its optimizer state."""
        size = 4 if self.model.lora.dtype == "fp32" else 2
        return float(size), moment_bytes(config, size)

    def estimate(
        self, config: RunConfig, plan: BatchPlan, ranks: int, kind: str, bf16: bool, device: Device
    ) -> list[MemoryPart]:
        """The parts of a rank's peak, which is reached in the backward pass of a step after the first."""
        model, facts = self.model, self.facts
        size = 2 if (bf16 if model.compute_dtype == "auto" else model.compute_dtype == "bf16") else 4
        positions = plan.micro_batch_size * model.context
        per_weight = weight_bytes(model, size)
        weights, moments = self._adapter_bytes(config)
        unquantised = 0 if model.quantisation == "none" else facts.unquantised_parameters
        quantised = facts.linear_parameters - unquantised
        how = f"{quantised / 1e9:.2f} G weights of {per_weight:.2f} bytes"
        trained = self.trainable
        others = facts.other_parameters - facts.expert_parameters
        parts = [
            MemoryPart("base", quantised * per_weight, f"{how} ({model.quantisation})"),
            MemoryPart("embeddings", others * size, "and output layer, norms; not quantised"),
            MemoryPart("LoRA", trained * weights, f"{trained / 1e6:.1f} M weights, whole on each rank"),
        ]
        if facts.expert_parameters:
            in_nf4 = model.quantisation == "nf4"
            told = f"of {per_weight:.2f} bytes (nf4), and without LoRA" if in_nf4 else "not quantised, and without LoRA"
            packed = facts.stacked_experts * in_nf4
            experts = packed * per_weight + (facts.expert_parameters - packed) * size
            parts.insert(1, MemoryPart("experts", experts, f"{facts.expert_parameters / 1e9:.2f} G weights, {told}"))
        if unquantised:
            left = f"{unquantised / 1e9:.2f} G weights of {size} bytes; bitsandbytes does not quantise these layers"
            parts.insert(1, MemoryPart("unquantised", unquantised * size, left))
        if kind == "zero2":
            buckets = min(config.strategy.bucket_mb * 1e6, 4 * trained) * (2 if config.strategy.overlap else 1)
            parts.append(MemoryPart("gradients", 4 * trained / ranks + buckets, f"1/{ranks}, and buckets"))
            parts.append(MemoryPart("optimizer", 12 * trained / ranks, f"1/{ranks} of fp32 weights and two moments"))
        else:
            parts.append(MemoryPart("gradients", trained * weights, "of LoRA alone"))
            parts.append(MemoryPart("optimizer", trained * moments, config.optim.kind))
        layer = layer_activations(config, model, facts, bf16, device) * positions
        if config.train.activation_checkpointing:
            kept = facts.layers * (size + 1) * facts.hidden * positions + layer
            beside = facts.layers * int8_inputs(model, facts, size) * positions
            note = "each layer's input, one layer whole" + (", and what int8 layers keep" if beside else "")
            parts.append(MemoryPart("activations", kept + beside, note))
        else:
            parts.append(MemoryPart("activations", facts.layers * layer, f"{facts.layers} layers, whole"))
        parts.append(loss_part(positions, facts.vocab_size, 0, bf16, device, facts.caps_logits))
        largest = max(linear.inputs * linear.outputs for linear in facts.linears)
        backward = (4 + size) * facts.inner * positions + 2 * size * largest
        backward += size * facts.largest_stack * (model.quantisation == "nf4")
        backward += _PAIR * facts.heads * model.context * positions * facts.keeps_scores
        parts.append(
            MemoryPart("temporaries", backward, "of one layer's backward pass, its largest weight dequantised")
        )
        runtime = runtime_part(kind, device, compiler=True)
        parts.append(MemoryPart("runtime", runtime.size_bytes + _LIBRARIES_MB * 1e6 * (device == "cpu"), runtime.note))
        lost = FRAGMENTATION * sum(part.size_bytes for part in parts)
        return [*parts, MemoryPart("fragmentation", lost, f"{FRAGMENTATION:.0%} of the above")]
