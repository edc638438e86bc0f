"""GPT-2 (Radford et al. 2019), by configuration.

Shapes: B rows, T positions, D width, H heads, K = D / H, V vocabulary.

Parameter names are those of transformers' GPT-2, and `save` writes its format: the folder loads with
`AutoModelForCausalLM.from_pretrained`. Two differences are bridged there: transformers keeps linear
weights transposed (Conv1D), and always has a bias on query, key and value.
"""

import contextlib
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtrain import model_files, tensorfile
from llmtrain.config.model_sections import GPTModel
from llmtrain.data import IGNORE, Documents
from llmtrain.manifest import FileInfo
from llmtrain.model_files import WEIGHTS
from llmtrain.models import parameters
from llmtrain.models.attention import attention, kept_apart
from llmtrain.models.cached import CachedGenerator, KVCache
from llmtrain.models.dropout import dropout
from llmtrain.models.loss import Head, batch_loss, token_losses
from llmtrain.models.projections import norm_linear, norm_mlp

_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


class Attention(nn.Module):
    def __init__(self, config: GPTModel):
        super().__init__()
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.c_attn = nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        self.c_proj = nn.Linear(config.width, config.width)

    def forward(
        self,
        x_BTD: Tensor,
        norm: nn.LayerNorm,
        apart: Documents | Tensor | None,
        cache: KVCache | None,
        layer: int,
    ) -> Tensor:
        batch, length, width = x_BTD.shape
        qkv = norm_linear(x_BTD, norm, self.c_attn).view(batch, length, 3, self.num_heads, width // self.num_heads)
        q_BHTK, k_BHTK, v_BHTK = qkv.permute(2, 0, 3, 1, 4)
        if cache is not None:
            k_BHTK, v_BHTK = cache.extend(layer, k_BHTK, v_BHTK)
        causal = apart is None and length > 1  # one new position may look at all cached ones
        out_BHTK = attention(q_BHTK, k_BHTK, v_BHTK, apart, causal, self.dropout if self.training else 0.0)
        return self.c_proj(out_BHTK.transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    def __init__(self, config: GPTModel):
        super().__init__()
        self.c_fc = nn.Linear(config.width, 4 * config.width)
        self.c_proj = nn.Linear(4 * config.width, config.width)

    def forward(self, x_BTD: Tensor, norm: nn.LayerNorm) -> Tensor:
        return norm_mlp(x_BTD, norm, self.c_fc, self.c_proj)


class Block(nn.Module):
    def __init__(self, config: GPTModel):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(self, x_BTD: Tensor, apart: Documents | Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        x_BTD = x_BTD + dropout(self.attn(x_BTD, self.ln_1, apart, cache, layer), self.dropout, self.training)
        return x_BTD + dropout(self.mlp(x_BTD, self.ln_2), self.dropout, self.training)


class GPT(nn.Module):
    """`forward` returns the summed loss of a batch, `logits` what generation needs."""

    def __init__(
        self,
        config: GPTModel,
        vocab_size: int,
        seed: int | None = 0,
        activation_checkpointing: bool = False,
        flash: bool = False,
    ):
        """Without a seed no weight is drawn (6 s for a billion of them): they hold nothing until `load`.

        `flash`: what `attention.has_flash` says of the device that it will be on.
        """
        super().__init__()
        self._flash = flash
        self.config, self.vocab_size = config, vocab_size
        self.activation_checkpointing = activation_checkpointing
        # GPT-2's initialisation draws every weight itself: torch's would be drawn before, and overwritten.
        draws = parameters.undrawn() if config.init == "gpt2" or seed is None else contextlib.nullcontext()
        with parameters.seeded(seed):
            with draws:
                self.transformer = nn.ModuleDict(
                    {
                        "wte": nn.Embedding(vocab_size, config.width),
                        "wpe": nn.Embedding(config.context, config.width),
                        "h": nn.ModuleList(Block(config) for _ in range(config.num_layers)),
                        "ln_f": nn.LayerNorm(config.width),
                    }
                )
                self.lm_head = nn.Linear(config.width, vocab_size, bias=False)
            if config.tie_weights:
                self.lm_head.weight = cast(nn.Embedding, self.transformer["wte"]).weight
            if config.init == "gpt2" and seed is not None:
                parameters.draw(self, ("c_proj.weight",), config.num_layers)

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
        parts: Any = self.transformer
        x_BTD = dropout(parts["wte"](input_ids) + parts["wpe"](positions), self.config.dropout, self.training)
        drops = self.training and self.config.dropout > 0
        apart = kept_apart(documents, x_BTD, self._flash and not drops)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for layer, block in enumerate(parts["h"]):
            if recompute:  # restores dropout's random numbers: the same loss and gradients, bit for bit
                x_BTD = checkpoint(block, x_BTD, apart, cache, layer, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, apart, cache, layer)
        return parts["ln_f"](x_BTD)

    def text_generator(self) -> CachedGenerator:
        self.eval()
        return CachedGenerator(self._continued, self.config.context, self.lm_head.weight.device)

    def _continued(self, input_ids: Tensor, cache: KVCache | None) -> tuple[Tensor, KVCache]:
        cache = KVCache() if cache is None else cache
        return self.logits(input_ids, cache=cache)[0, -1], cache

    def hidden_matrices(self) -> list[tuple[nn.Parameter, int]]:
        """The weights inside the blocks, and how many matrices each of them is: query, key and value stand as three."""
        blocks: Any = self.transformer["h"]
        found: list[tuple[nn.Parameter, int]] = []
        for block in blocks:
            found += [(block.attn.c_attn.weight, 3), (block.attn.c_proj.weight, 1)]
            found += [(block.mlp.c_fc.weight, 1), (block.mlp.c_proj.weight, 1)]
        return found

    def title(self) -> str:
        """What is trained, for people."""
        return f"GPT with {self.num_parameters() / 1e6:.1f} M parameters, {self.vocab_size:,} tokens vocabulary"

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> float:
        """Forward and backward, after PaLM (Chowdhery et al. 2022, appendix B): 6 N + 12 L D T."""
        parts: Any = self.transformer
        embeddings = parts["wpe"].weight.numel() + (0 if self.config.tie_weights else parts["wte"].weight.numel())
        attention = 12 * self.config.num_layers * self.config.width * self.config.context
        return 6 * (self.num_parameters() - embeddings) + attention

    def save(self, folder: Path, weights: dict[str, Tensor], eos_id: int) -> dict[str, FileInfo]:
        """Write `weights` (this model's parameters by name) and config.json in transformers' format.

        Returns the weights' file, which is on the disk by then.
        """
        tensors: dict[str, Tensor] = {}
        for name, tensor in weights.items():
            if name == "lm_head.weight" and self.config.tie_weights:
                continue
            tensors[name] = tensor.t() if name.endswith(_CONV1D) else tensor
        if not self.config.qkv_bias:
            for layer in range(self.config.num_layers):
                tensors[f"transformer.h.{layer}.attn.c_attn.bias"] = torch.zeros(3 * self.config.width)
        model_files.write(folder, self.config, self.vocab_size, eos_id)
        return {WEIGHTS: tensorfile.write(folder / WEIGHTS, tensors, {"format": "pt"})}

    def load(self, folder: Path) -> None:
        """Fill the parameters from what `save` or transformers wrote.

        Raises:
            CheckpointError: the file is missing or damaged, or its tensors are not this model's.
            OSError: it cannot be read now, which says nothing about it.
        """
        tensors = parameters.read(folder)
        if "wte.weight" in tensors:  # the first GPT-2s on the Hub
            tensors = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
        no_bias = () if self.config.qkv_bias else (".attn.c_attn.bias",)
        unused = (".attn.bias", ".attn.masked_bias")  # causal masks of old
        if self.config.tie_weights:
            unused += ("lm_head.weight",)
        parameters.fill(self, tensors, folder, _CONV1D, zeros=no_bias, unused=unused)
