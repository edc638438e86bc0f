"""Continuing one text with a key-value cache, whatever the model keeps in it."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass
class KVCache:
    """Keys and values of the positions already seen, per layer, for generation."""

    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (1, H, T, K) each

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if layer < len(self.layers):
            past_keys, past_values = self.layers[layer]
            keys, values = torch.cat([past_keys, keys], 2), torch.cat([past_values, values], 2)
            self.layers[layer] = (keys, values)
        else:
            self.layers.append((keys, values))
        return keys, values


class Forward(Protocol):
    """One step of a model in evaluation mode."""

    def __call__(self, input_ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """(V,) logits of the token after `input_ids` (1, T), and the cache that now has these positions too.

        `cache`: what the last call returned; None: nothing has been seen.
        """
        ...


class CachedGenerator:
    """An `evaluate.Generator`. Past the context it starts again from the last half."""

    def __init__(self, forward: Forward, context: int, device: torch.device):
        self._forward, self._context, self._device = forward, context, device
        self._cache: Any = None
        self._seen: list[int] = []  # what the cache holds

    @torch.no_grad()
    def next_logits(self, input_ids: Tensor) -> Tensor:
        """(V,) logits of the token after `input_ids` (T,), which continue what was given before."""
        self._seen += input_ids.tolist()
        if len(self._seen) > self._context:
            self._cache = None
            self._seen = self._seen[-max(1, self._context // 2) :]
            input_ids = torch.tensor(self._seen)
        logits_V, self._cache = self._forward(input_ids.to(self._device).unsqueeze(0), self._cache)
        return logits_V
