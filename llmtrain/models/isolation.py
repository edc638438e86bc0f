"""Proof, at the start of a run, that documents sharing a row do not see each other.

A wrong mask hardly moves the loss, so nothing would tell. Packed into one row and computed as training computes them,
documents must keep their logits when the rest of the row holds other tokens. And these must be the logits of
transformers' own forward pass over each document alone: that finds positions that do not restart, and an architecture
that does something to its logits that our loss does not know (scaling, capping).

Each `.item()` here is a host sync: fewer than twenty, once at the start of a run.
"""

import contextlib
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmtrain.data import Batch, Documents
from llmtrain.errors import ModelError
from llmtrain.models import base as bases
from llmtrain.models.qlora import QLoRA

_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-3}
"""What other tokens in the row may move a document's logits by, as a share of their standard deviation. The same
kernels compute the same shapes: without experts it is 0."""
_COMPANY = 3.0
"""Experts are given the tokens of all rows together, which rounds differently: up to so many times what other tokens in
another row do is no leak."""
_TRIES = 3
"""Rounding may now and then send a token to another expert; a leak is there whatever the other tokens are."""
_ALONE = 0.05
"""Limit for the difference from a document alone, which is computed in other shapes."""
_DOCUMENTS, _POSITIONS = 6, 16


def check(model: QLoRA, batch: Batch, doc_lens: list[int], autocast: bool) -> float:
    """Compare packed documents with each alone, and with themselves beside others.

    Args:
        batch: one row, as training gives it; doc_lens: lengths of its documents, in order.

    Returns:
        `difference`.

    Raises:
        ModelError: packed documents see each other, or logits are not transformers'.
    """
    told = f"model.base={model.config.base}: the logits of "
    with bases.rows_apart(model):  # what 8 bits round differently beside other rows can be larger than a leak
        if len(doc_lens) > 1:
            moved, allowed = neighbours(model, batch, doc_lens, autocast)
            if not moved <= allowed:  # also where it is NaN
                raise ModelError(
                    f"{told}a document move by {moved:.3g} of their standard deviation with what else is in its row "
                    f"({allowed:.2g} could be rounding). This architecture does not keep packed documents apart. "
                    "Nothing was trained; data.packing=none puts one sample in a row, which has nothing to keep apart"
                )
        found = difference(model, batch, doc_lens, autocast)
    if found <= _ALONE:
        return found
    if len(doc_lens) == 1:
        which, also, advice = "a document", "", "take another base"
    else:
        which, also = f"{len(doc_lens)} documents in a row", ", or does not restart positions with each document"
        advice = "data.packing=none may help, or take another base"
    raise ModelError(
        f"{told}{which} differ from transformers' own over each alone by {found:.3g} of their standard deviation "
        f"({_ALONE} could be rounding). This architecture changes its logits in a way that the loss does not know"
        f"{also}. Nothing was trained; {advice}"
    )


@torch.no_grad()
def difference(model: QLoRA, batch: Batch, doc_lens: list[int], autocast: bool) -> float:
    """How far packed logits are from those of each document alone, as a share of the logits' standard deviation.

    Looks at the beginnings of all documents but the first: that is where the ones before would show most.
    """
    batch = _without_dropout(model, batch)
    places = _beginnings(batch, doc_lens)[1 if len(doc_lens) > 1 else 0 :]
    squares = variance = 0.0
    for packed, (begin, end) in zip(_logits(model, batch, places, autocast), places, strict=True):
        with _computing(batch, autocast):  # transformers' own pass: its attention, its output layer
            alone = model.peft(input_ids=batch.input_ids[:, begin:end], use_cache=False).logits[0].float()
        if alone.shape != packed.shape:  # an output layer with rows that are no tokens
            return math.inf
        squares += (packed - alone).square().sum().item()
        variance += (alone - alone.mean(1, keepdim=True)).square().sum().item()
    return (squares / max(variance, 1e-30)) ** 0.5


@torch.no_grad()
def neighbours(model: QLoRA, batch: Batch, doc_lens: list[int], autocast: bool) -> tuple[float, float]:
    """How far the logits of a document in the row move with other tokens in all others, and how far they may.

    Of the document that moves most; as a share of the logits' standard deviation.
    """
    batch = _without_dropout(model, batch)
    allowed = _ROUNDING[torch.bfloat16 if autocast else model.dtype]
    moved = float("nan")
    for seed in range(_TRIES):
        moved = _moved(model, batch, doc_lens, autocast, seed)
        if moved <= allowed:
            break
        allowed = max(allowed, _COMPANY * _moved_by_another_row(model, batch, doc_lens, autocast, seed))
    return moved, allowed


def _moved(model: QLoRA, batch: Batch, doc_lens: list[int], autocast: bool, seed: int) -> float:
    """Every second document gets other tokens, then the rest; those between must stay what they are."""
    places = _beginnings(batch, doc_lens)
    before = _logits(model, batch, places, autocast)
    ends = torch.tensor(doc_lens[:-1], device=batch.input_ids.device).cumsum(0)
    number_T = torch.bucketize(torch.arange(batch.input_ids.shape[1], device=ends.device), ends, right=True)
    others = _other_tokens(batch, doc_lens, seed)
    found: list[Tensor] = []
    for parity in (0, 1):
        changed = replace(batch, input_ids=others.where(number_T % 2 == parity, batch.input_ids))
        after = _logits(model, changed, places, autocast)
        found += [_share(a, b) for a, b in list(zip(before, after, strict=True))[1 - parity :: 2]]
    return torch.stack(found).max().item()


def _moved_by_another_row(model: QLoRA, batch: Batch, doc_lens: list[int], autocast: bool, seed: int) -> float:
    """What no leak between documents can do."""
    places = _beginnings(batch, doc_lens)
    documents = batch.documents
    if documents is not None:
        starts = documents.starts
        documents = Documents(torch.cat([starts, starts + batch.input_ids.shape[1]]), documents.longest)
    positions = None if batch.positions is None else batch.positions.repeat(2, 1)
    beside = [
        _logits(model, replace(batch, input_ids=ids, documents=documents, positions=positions), places, autocast)
        for ids in (
            torch.cat([batch.input_ids, other]) for other in (batch.input_ids, _other_tokens(batch, doc_lens, seed))
        )
    ]
    return torch.stack([_share(a, b) for a, b in zip(*beside, strict=True)]).max().item()


def _other_tokens(batch: Batch, doc_lens: list[int], seed: int) -> Tensor:
    """The row's own, in another order: whatever is special about an id, it can stand in a row."""
    filled = min(sum(doc_lens), batch.input_ids.shape[1])
    order = torch.randperm(filled, generator=torch.Generator().manual_seed(seed)).to(batch.input_ids.device)
    others = batch.input_ids.clone()
    others[:, :filled] = batch.input_ids[:, order]
    return others


def _share(packed: Tensor, other: Tensor) -> Tensor:
    """Root mean square difference of (N, V) logits, as a share of their standard deviation."""
    variance = (packed - packed.mean(1, keepdim=True)).square().mean()
    return ((packed - other).square().mean() / variance.clamp_min(1e-30)).sqrt()


def _beginnings(batch: Batch, doc_lens: list[int]) -> list[tuple[int, int]]:
    """Where in the row the first documents begin, and where what is looked at of them ends."""
    length, begin = batch.input_ids.shape[1], 0
    places: list[tuple[int, int]] = []
    for each in doc_lens[:_DOCUMENTS]:
        if (end := min(begin + each, length)) > begin:
            places.append((begin, min(end, begin + _POSITIONS)))
        begin = end
    return places


def _logits(model: QLoRA, batch: Batch, places: list[tuple[int, int]], autocast: bool) -> list[Tensor]:
    """(N, V) for each of the places in the first row."""
    with _computing(batch, autocast):
        hidden_TD = model.hidden(batch.input_ids, batch.documents, batch.positions)[0]
        return [model.logits(hidden_TD[begin:end]).float() for begin, end in places]


def _without_dropout(model: QLoRA, batch: Batch) -> Batch:
    """The model in evaluation mode, and the batch where it is."""
    model.eval()
    return batch.to(next(model.parameters()).device)


def _computing(batch: Batch, autocast: bool) -> Any:
    device = batch.input_ids.device
    return torch.autocast(device.type, torch.bfloat16) if autocast else contextlib.nullcontext()
