"""Proof, at the start of a run, that documents sharing a row do not see each other.

A wrong mask hardly moves the loss, so nothing would tell. The logits of documents packed into one row,
computed as training computes them, are compared with those of transformers' own forward pass over each
document alone. The same comparison finds an architecture that does something to its logits that our loss
does not know (scaling, capping).
"""

import contextlib
from typing import Any

import torch

from llmtrain.data import Batch
from llmtrain.errors import ModelError
from llmtrain.models import base as bases
from llmtrain.models.qlora import QLoRA

ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-3}
"""A root mean square difference up to this share of the logits' standard deviation always passes as rounding."""
_LEAK_SHARE = 0.25
"""Rounding may exceed that in deep models. A base leaks if the difference reaches this share of what it is when nothing
keeps the documents apart."""
_SINGLE_DOCUMENT_TOLERANCE = 0.05
"""The limit where a row holds one document, so that no leak can be measured."""
_DOCUMENTS, _POSITIONS = 6, 16


@torch.no_grad()
def difference(model: QLoRA, batch: Batch, doc_lens: list[int], autocast: bool, apart: bool = True) -> float:
    """How far packed logits are from those of each document alone, as a share of the logits' standard deviation.

    Looks at the beginnings of all documents but the first: that is where the ones before would show most.

    Args:
        batch: one row, as training gives it; doc_lens: lengths of its documents, in order.
        apart: False leaves out all that would keep them apart.
    """
    model.eval()
    device = next(model.parameters()).device
    batch = batch.to(device)
    inputs = batch.input_ids
    context: Any = torch.autocast(device.type, torch.bfloat16) if autocast else contextlib.nullcontext()
    squares = variance = 0.0
    with context:
        hidden_TD = (
            model.hidden(inputs, batch.documents, batch.positions) if apart else model.hidden(inputs, None, None)
        )[0]
        begin = 0
        for number, length in enumerate(doc_lens[:_DOCUMENTS]):
            end = min(begin + length, inputs.shape[1])
            if end > begin and (number > 0 or len(doc_lens) == 1):
                kept = min(end - begin, _POSITIONS)
                packed = model.logits(hidden_TD[begin : begin + kept]).float()
                # transformers' own pass over the document alone: its attention, its output layer.
                alone = model.peft(input_ids=inputs[:, begin : begin + kept], use_cache=False).logits[0].float()
                squares += (packed - alone).square().sum().item()
                variance += (alone - alone.mean(1, keepdim=True)).square().sum().item()
            begin = end
    return (squares / max(variance, 1e-30)) ** 0.5


def check(model: QLoRA, batch: Batch, doc_lens: list[int], autocast: bool) -> float:
    """Raises ModelError if packed documents see each other; returns the difference. Arguments as of `difference`."""
    allowed = _SINGLE_DOCUMENT_TOLERANCE
    with bases.rows_apart(model):  # what 8 bits round differently in company is no leak, and can be larger than one
        found = difference(model, batch, doc_lens, autocast)
        if len(doc_lens) > 1:
            leak = difference(model, batch, doc_lens, autocast, apart=False)
            allowed = max(ROUNDING[torch.bfloat16 if autocast else model.dtype], _LEAK_SHARE * leak)
    if found <= allowed:  # a difference that is no number is not
        return found
    where = "a document" if len(doc_lens) == 1 else f"{len(doc_lens)} documents in a row"
    differ = (
        f"model.base={model.config.base}: the logits of {where} differ from transformers' own over each alone by "
        f"{found:.3g} of their standard deviation ({allowed:.2g} could be rounding). This architecture "
    )
    if len(doc_lens) == 1:
        raise ModelError(
            f"{differ}changes its logits in a way that the loss does not know. Nothing was trained; take another base"
        )
    raise ModelError(
        f"{differ}does not keep packed documents apart, or changes its logits in a way that the loss does not know. "
        "Nothing was trained; data.packing=none puts one sample in a row, which has nothing to keep apart"
    )
