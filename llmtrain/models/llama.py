"""Llama (Touvron et al. 2023, arXiv:2302.13971), by configuration, and its kin: Qwen 2 and 3.

Shapes: B rows, T positions, D width, H heads, G heads of keys and values, K channels of a head, V vocabulary.

Parameter names are those of transformers, and `save` writes its format: the folder loads with
`AutoModelForCausalLM.from_pretrained`, and with what else reads Llamas.
"""

import math
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtrain import model_files, tensorfile
from llmtrain.config.model_sections import LlamaModel, RopeScalingSection
from llmtrain.data import IGNORE, Documents
from llmtrain.manifest import FileInfo
from llmtrain.model_files import WEIGHTS
from llmtrain.models import parameters
from llmtrain.models.attention import attention, computed_in, kept_apart
from llmtrain.models.cached import CachedGenerator, KVCache
from llmtrain.models.loss import Head, batch_loss, token_losses

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the positions' angles, (T, K) or (B, 1, T, K)."""


def rotation(positions: Tensor, config: LlamaModel, dtype: torch.dtype) -> Rotation:
    """For `positions` (T,) or (B, T), rotary embeddings (Su et al. 2021)."""
    width = config.head_channels
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, width, 2, device=positions.device) / width)
    if config.rope_scaling is not None:
        frequencies = _stretched(frequencies, config.rope_scaling)
    angles = positions.unsqueeze(-1).float() * frequencies
    angles = torch.cat([angles, angles], -1)
    if positions.ndim == 2:
        angles = angles.unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _stretched(frequencies: Tensor, by: RopeScalingSection) -> Tensor:
    """Llama 3.1's (Grattafiori et al. 2024, arXiv:2407.21783, and Meta's published code): slow channels turn `factor`
    times as slowly, fast ones as before."""
    turns = by.original_context / (2 * math.pi) * frequencies
    kept = ((turns - by.low_freq_factor) / (by.high_freq_factor - by.low_freq_factor)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / by.factor)


def rotated(x_BHTK: Tensor, by: Rotation) -> Tensor:
    """Each channel of the first half with its partner in the second."""
    one, two = x_BHTK.chunk(2, -1)
    return x_BHTK * by[0] + torch.cat([-two, one], -1) * by[1]


def _low(x_BTD: Tensor) -> Tensor:
    """As autocast would cast it for each product that takes it, once for all of them."""
    return x_BTD.to(computed_in(x_BTD))


class Attention(nn.Module):
    def __init__(self, config: LlamaModel):
        super().__init__()
        self.head_width = config.head_channels
        whole, narrow = config.num_heads * self.head_width, config.kv_heads * self.head_width
        self.q_proj = nn.Linear(config.width, whole, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.width, narrow, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.width, narrow, bias=config.qkv_bias)
        self.o_proj = nn.Linear(whole, config.width, bias=False)
        self.q_norm = nn.RMSNorm(self.head_width, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_width, eps=config.norm_eps) if config.qk_norm else None

    def forward(
        self, x_BTD: Tensor, by: Rotation, apart: Documents | Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        batch, length, _ = x_BTD.shape
        q_BHTK, k_BGTK, v_BGTK = (
            projection(x_BTD).view(batch, length, -1, self.head_width).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_BHTK, k_BGTK = _low(self.q_norm(q_BHTK.float())), _low(self.k_norm(k_BGTK.float()))
        q_BHTK, k_BGTK = rotated(q_BHTK, by), rotated(k_BGTK, by)
        if cache is not None:
            k_BGTK, v_BGTK = cache.extend(layer, k_BGTK, v_BGTK)
        causal = apart is None and length > 1  # one new position may look at all cached ones
        out_BHTK = attention(q_BHTK, k_BGTK, v_BGTK, apart, causal, 0.0)
        return self.o_proj(out_BHTK.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: LlamaModel):
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.inner_width, bias=False)
        self.up_proj = nn.Linear(config.width, config.inner_width, bias=False)
        self.down_proj = nn.Linear(config.inner_width, config.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nn.Module):
    def __init__(self, config: LlamaModel):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x_BTD: Tensor, by: Rotation, apart: Documents | Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        x_BTD = x_BTD + self.self_attn(_low(self.input_layernorm(x_BTD)), by, apart, cache, layer)
        return x_BTD + self.mlp(_low(self.post_attention_layernorm(x_BTD)))


class Llama(nn.Module):
    """`forward` returns the summed loss of a batch, `logits` what generation needs."""

    def __init__(
        self,
        config: LlamaModel,
        vocab_size: int,
        seed: int | None = 0,
        activation_checkpointing: bool = False,
        flash: bool = False,
    ):
        """Arguments as of `gpt.GPT`."""
        super().__init__()
        self._flash = flash
        self.config, self.vocab_size = config, vocab_size
        self.activation_checkpointing = activation_checkpointing
        with parameters.seeded(seed):
            with parameters.undrawn():
                self.model = nn.ModuleDict(
                    {
                        "embed_tokens": nn.Embedding(vocab_size, config.width),
                        "layers": nn.ModuleList(Block(config) for _ in range(config.num_layers)),
                        "norm": nn.RMSNorm(config.width, eps=config.norm_eps),
                    }
                )
                self.lm_head = nn.Linear(config.width, vocab_size, bias=False)
            if config.tie_weights:
                self.lm_head.weight = cast(nn.Embedding, self.model["embed_tokens"]).weight
            if seed is not None:
                parameters.draw(self, ("o_proj.weight", "down_proj.weight"), config.num_layers)

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor,
        documents: Documents | None = None,
        positions: Tensor | None = None,
        learned: Tensor | None = None,
    ) -> Tensor:
        """Sum of the cross-entropies of all supervised positions, in nats: fp32, without gradients float64."""
        hidden_BTD = self._hidden(input_ids, documents, positions, None)
        return batch_loss(hidden_BTD, Head(self.lm_head.weight), targets, learned, IGNORE)

    @torch.no_grad()
    def token_losses(
        self, input_ids: Tensor, targets: Tensor, documents: Documents | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """(B, T) cross-entropies in nats, 0 where a position is not supervised; their sum is `forward`'s result."""
        hidden_BTD = self._hidden(input_ids, documents, positions, None)
        head = Head(self.lm_head.weight)
        return token_losses(hidden_BTD.flatten(0, 1), head, targets.flatten(), IGNORE).view_as(targets)

    def logits(
        self,
        input_ids: Tensor,
        documents: Documents | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, T, V). With a cache, `input_ids` continues what the cache has seen."""
        return self.lm_head(self._hidden(input_ids, documents, positions, cache))

    def _hidden(
        self, input_ids: Tensor, documents: Documents | None, positions: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        if positions is None:
            first = cache.length if cache is not None else 0
            positions = torch.arange(first, first + input_ids.shape[1], device=input_ids.device)
        parts: Any = self.model
        x_BTD = parts["embed_tokens"](input_ids)
        by = rotation(positions, self.config, computed_in(x_BTD))
        apart = kept_apart(documents, x_BTD, self._flash)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for layer, block in enumerate(parts["layers"]):
            if recompute:
                x_BTD = checkpoint(block, x_BTD, by, apart, cache, layer, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, by, apart, cache, layer)
        return parts["norm"](x_BTD)

    def text_generator(self) -> CachedGenerator:
        self.eval()
        return CachedGenerator(self._continued, self.config.context, self.lm_head.weight.device)

    def _continued(self, input_ids: Tensor, cache: KVCache | None) -> tuple[Tensor, KVCache]:
        cache = KVCache() if cache is None else cache
        return self.logits(input_ids, cache=cache)[0, -1], cache

    def hidden_matrices(self) -> list[tuple[nn.Parameter, int]]:
        """The weights inside the blocks, each one matrix."""
        return [(p, 1) for name, p in self.named_parameters() if ".layers." in name and p.ndim == 2]

    def title(self) -> str:
        """What is trained, for people."""
        millions = self.num_parameters() / 1e6
        return f"{self.config.architecture} with {millions:.1f} M parameters, {self.vocab_size:,} tokens vocabulary"

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> float:
        """Forward and backward, after PaLM (Chowdhery et al. 2022, appendix B): 6 N + 12 L D T."""
        parts: Any = self.model
        embeddings = 0 if self.config.tie_weights else parts["embed_tokens"].weight.numel()
        channels = self.config.num_heads * self.config.head_channels
        attention = 12 * self.config.num_layers * channels * self.config.context
        return 6 * (self.num_parameters() - embeddings) + attention

    def save(self, folder: Path, weights: dict[str, Tensor], eos_id: int) -> dict[str, FileInfo]:
        """Write `weights` (this model's parameters by name) and config.json in transformers' format.

        Returns the weights' file, which is on the disk by then.
        """
        tensors = {name: p for name, p in weights.items() if name != "lm_head.weight" or not self.config.tie_weights}
        model_files.write(folder, self.config, self.vocab_size, eos_id)
        return {WEIGHTS: tensorfile.write(folder / WEIGHTS, tensors, {"format": "pt"})}

    def load(self, folder: Path) -> None:
        """Fill the parameters from what `save` or transformers wrote. Raises as `gpt.GPT.load` does."""
        unused = ("rotary_emb.inv_freq",)  # of old
        if self.config.tie_weights:
            unused += ("lm_head.weight",)
        parameters.fill(self, parameters.read(folder), folder, unused=unused)
