"""Documents -> rows of context + 1 tokens. Pure functions on arrays."""

import numpy as np
from numpy.typing import NDArray

from llmtrain.shards import Rows, Tokens

Lengths = NDArray[np.int32]


def contiguous_rows(num_tokens: int, context: int, keep_rest: bool) -> tuple[int, int]:
    """(rows, tokens left over) of a stream cut every `context` tokens.

    Row i covers tokens [i * context, i * context + context + 1): the last token of a row is the first of
    the next, so that every token but the stream's first is predicted once. With `keep_rest` an incomplete
    last row counts if it predicts something.
    """
    full = max(0, (num_tokens - 1) // context)
    rest = num_tokens - full * context if full else num_tokens
    if rest < 2:
        return full, 0 if full else rest
    return (full + 1, 0) if keep_rest else (full, rest - 1 if full else rest)


def pack_contiguous(stream: Tokens, context: int, padding_id: int) -> Rows:
    """Rows over `stream`, which begins at a row's first token; an incomplete last row is padded."""
    count, _ = contiguous_rows(len(stream), context, keep_rest=True)
    tokens = np.full((count, context + 1), padding_id, stream.dtype)
    doc_lens: list[Lengths] = []
    for row in range(count):
        piece = stream[row * context : row * context + context + 1]
        tokens[row, : len(piece)] = piece
        doc_lens.append(np.array([len(piece)], np.int32))
    return Rows(tokens, doc_lens, None)


def split_long(doc_lens: NDArray[np.int64], context: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """(starts, lengths, dropped): pieces of at most context + 1 tokens in the stream of all documents.

    The next piece of a long document starts with the last token of the one before, so that each
    transition is predicted exactly once. Documents of one token predict nothing and are dropped.
    """
    doc_starts = np.cumsum(doc_lens) - doc_lens
    counts = np.maximum(0, -(-(doc_lens - 1) // context))
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(doc_starts, counts) + within * context
    lengths = np.minimum(context + 1, np.repeat(doc_starts + doc_lens, counts) - starts)
    return starts, lengths, int((doc_lens == 1).sum())


def best_fit(lengths: NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: which pieces share a row. Each piece goes where it leaves the least room.

    The fullest row that still fits is found through a bit set of the free capacities in use, so the
    cost does not grow with the number of rows.
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}
    free_in_use = 0  # bit n is set if a row with n free tokens exists
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        fitting = free_in_use >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[free].pop()
            if not open_rows[free]:
                free_in_use &= ~(1 << free)
            rows[row].append(piece)
        else:
            free, row = capacity, len(rows)
            rows.append([piece])
        rest = free - length
        if rest >= 2:
            open_rows.setdefault(rest, []).append(row)
            free_in_use |= 1 << rest
    return rows


def pack_documents(
    stream: Tokens,
    learned: NDArray[np.uint8] | None,
    doc_lens: NDArray[np.int64],
    context: int,
    padding_id: int,
    together: bool,
) -> tuple[Rows, int]:
    """Rows of whole documents, and how many tokens were dropped (documents of one token).

    Args:
        learned: 1 for each token of the stream that is to be learned; None: all are.
        together: several documents a row, best fit; else one.
    """
    starts, lengths, dropped = split_long(doc_lens, context)
    plan = best_fit(lengths, context + 1) if together else [[piece] for piece in range(len(lengths))]
    tokens = np.full((len(plan), context + 1), padding_id, stream.dtype)
    mask = None if learned is None else np.zeros(tokens.shape, np.uint8)
    row_lens: list[Lengths] = []
    for row, pieces in enumerate(plan):
        at = 0
        for piece in pieces:
            start, length = int(starts[piece]), int(lengths[piece])
            tokens[row, at : at + length] = stream[start : start + length]
            if mask is not None and learned is not None:
                mask[row, at : at + length] = learned[start : start + length]
            at += length
        row_lens.append(lengths[pieces].astype(np.int32))
    return Rows(tokens, row_lens, mask), dropped


def count_targets(rows: Rows) -> int:
    """Tokens that are predicted and count in the loss."""
    total = 0
    for row, lens in enumerate(rows.doc_lens):
        if rows.loss_mask is None:
            total += int((lens - 1).sum())
        else:
            firsts = np.cumsum(lens) - lens  # nothing predicts a document's first token
            total += int(rows.loss_mask[row, : lens.sum()].sum()) - int(rows.loss_mask[row, firsts].sum())
    return total
