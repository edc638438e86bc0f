"""Held-out loss, and text that the model continues."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llmtrain import heartbeat, ledger
from llmtrain.config.schema import SampleSection
from llmtrain.data import Batch
from llmtrain.shards import SplitInfo
from llmtrain.world import World


@dataclass(frozen=True)
class SplitLoss:
    """How well a split is predicted."""

    loss: float
    """Nats per supervised token."""
    targets: int

    @property
    def perplexity(self) -> float:
        return ledger.perplexity(self.loss)

    def bits_per_byte(self, split: SplitInfo) -> float:
        """Comparable between tokenizers: nats per token x tokens per byte of text / ln 2."""
        return self.loss / math.log(2) * split.text_tokens / max(1, split.text_bytes)


def score(loss_of: Callable[[Batch], Tensor], batches: Iterable[Batch], world: World) -> SplitLoss:
    """Collective (control group). Token-weighted loss over the batches of all ranks.

    The sums are kept in float64, so that the result does not depend on how the rows were batched
    or spread. One host sync, at the end.
    """
    losses, targets = [], 0
    for batch in batches:
        heartbeat.at("evaluate")
        losses.append(loss_of(batch))
        targets += batch.num_targets
    total = torch.stack(losses).cpu().double().sum().item() if losses else 0.0
    heartbeat.on_to("scores")
    total, all_targets = world.sum_floats([total, float(targets)])
    return SplitLoss(total / max(1.0, all_targets), int(all_targets))


class Generator(Protocol):
    """A model that continues one text, and remembers what it has been given of it."""

    def next_logits(self, input_ids: Tensor) -> Tensor:
        """(V,) logits of the token after `input_ids` (T,), which continue what it has been given before."""
        ...


def sample_token(logits_V: Tensor, config: SampleSection, generator: torch.Generator) -> int:
    """Draw the next token: temperature, then top-k, then top-p (Holtzman et al. 2020). Host sync."""
    logits_V = logits_V.detach().float().cpu()
    if config.temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V / config.temperature
    if config.top_k is not None and config.top_k < len(logits_V):
        lowest_kept = logits_V.topk(config.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < lowest_kept, -math.inf)
    probabilities = logits_V.softmax(0)
    if config.top_p is not None and config.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(0) - ordered
        probabilities = probabilities.scatter(0, order, ordered.masked_fill(before >= config.top_p, 0.0))
    return int(torch.multinomial(probabilities, 1, generator=generator))


def continue_text(
    model: Generator, prompt_ids: list[int], config: SampleSection, seed: int, eos_id: int | None
) -> Iterator[int]:
    """Token ids that continue the prompt, one at a time, up to `config.tokens` or the end of the text.

    Uses a generator of its own: sampling never disturbs training's random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(prompt_ids, dtype=torch.int64)
    for _ in range(config.tokens):
        heartbeat.at("sample")
        token = sample_token(model.next_logits(ids), config, generator)
        if token == eos_id:
            return
        yield token
        ids = torch.tensor([token])
