"""Proof, at the start of a run, that documents sharing a row do not see each other.

A wrong mask hardly moves the loss, so nothing would tell. The logits of documents packed into one row,
computed as training computes them, are compared with those of transformers' own forward pass over each
document alone. The same comparison finds an architecture that does something to its logits that our loss
does not know (scaling, capping).
"""

import contextlib
from typing import Any

import torch
from torch import Tensor

from llmtrain.errors import ModelError
from llmtrain.models.qlora import QLoRA

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""Largest root mean square of the differences, as a share of the logits' standard deviation."""
_INT8_TOLERANCE = 0.05
"""int8 picks the outlier columns of a whole row together: its rounding depends on the neighbours."""
_DOCUMENTS, _POSITIONS = 6, 16


@torch.no_grad()
def difference(model: QLoRA, row: Tensor, doc_lens: list[int], positions: Tensor | None, autocast: bool) -> float:
    """How far packed logits are from those of each document alone, as a share of the logits' standard deviation.

    Args:
        row: (T,) token ids; doc_lens: lengths of its documents, in order; positions: (T,) as training gives them.
    """
    model.eval()
    device = next(model.parameters()).device
    inputs = row.to(device).unsqueeze(0)
    places = None if positions is None else positions.to(device).unsqueeze(0)
    context: Any = torch.autocast(device.type, torch.bfloat16) if autocast else contextlib.nullcontext()
    squares = variance = 0.0
    with context:
        hidden_TD = model.hidden(inputs, places)[0]
        begin = 0
        for length in doc_lens[:_DOCUMENTS]:
            end = min(begin + length, len(row))
            if end <= begin:
                break
            kept = min(end - begin, _POSITIONS)
            packed = model.logits(hidden_TD[end - kept : end]).float()
            alone = model.peft(input_ids=inputs[:, begin:end], use_cache=False, logits_to_keep=kept).logits[0].float()
            squares += (packed - alone[-kept:]).square().sum().item()
            variance += (alone[-kept:] - alone[-kept:].mean(1, keepdim=True)).square().sum().item()
            begin = end
    return (squares / max(variance, 1e-30)) ** 0.5


def check(model: QLoRA, row: Tensor, doc_lens: list[int], positions: Tensor | None, autocast: bool) -> float:
    """Raises ModelError if packed documents see each other; returns the difference."""
    tolerance = TOLERANCE[torch.bfloat16 if autocast else model.dtype]
    if model.config.quantisation == "int8":
        tolerance = max(tolerance, _INT8_TOLERANCE)
    found = difference(model, row, doc_lens, positions, autocast)
    if not found <= tolerance:  # a difference that is no number is found too
        raise ModelError(
            f"model.base={model.config.base}: the logits of {len(doc_lens)} documents packed into a row differ from "
            f"those of each alone by {found:.3g} of their standard deviation (at most {tolerance:g} is rounding). This "
            "architecture does not keep packed documents apart, or changes its logits in a way that the loss does not "
            "know. Nothing was trained; data.packing=none puts one sample in a row"
        )
    return found
