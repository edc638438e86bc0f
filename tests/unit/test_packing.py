"""Text cut into splits, and documents put into rows."""

import hashlib
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.sharding import pack, tasks
from launcher.sharding.records import Document
from llmtrain import shards
from llmtrain.config import data_sections as schema


def plain(text: str) -> Document:
    return Document(text, None, lambda: "here")


documents = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def transitions(rows: shards.Rows) -> Counter[tuple[int, int]]:
    """Every (token, next token) that a row predicts."""
    found: Counter[tuple[int, int]] = Counter()
    for tokens, lens in zip(rows.tokens.tolist(), rows.doc_lens, strict=True):
        at = 0
        for length in lens.tolist():
            found.update(zip(tokens[at : at + length - 1], tokens[at + 1 : at + length], strict=True))
            at += length
    return found


@given(lens=documents, context=st.integers(2, 12))
@settings(deadline=None)
def test_bestfit_predicts_every_transition_of_every_document_once(lens: list[int], context: int):
    stream = np.arange(sum(lens), dtype=np.uint32)
    rows, dropped = pack.pack_documents(stream, None, np.array(lens, np.int64), context, padding_id=999, together=True)
    ends = np.cumsum(lens)
    wanted = Counter((i, i + 1) for i in range(sum(lens) - 1) if i + 1 not in set(ends.tolist()))
    assert transitions(rows) == wanted
    assert dropped == sum(length == 1 for length in lens)
    assert all(piece >= 2 for row in rows.doc_lens for piece in row)
    assert all(row.sum() <= context + 1 for row in rows.doc_lens)


@given(lens=documents, capacity=st.integers(41, 90))
def test_bestfit_wastes_little(lens: list[int], capacity: int):
    rows = pack.best_fit(np.array(lens, np.int64), capacity)
    assert sorted(piece for row in rows for piece in row) == list(range(len(lens)))
    used = [sum(lens[piece] for piece in row) for row in rows]
    assert max(used) <= capacity
    assert len(rows) <= 11 / 9 * -(-sum(lens) // capacity) + 1 + max(lens) / capacity * len(rows)


@given(tokens=st.integers(0, 200), context=st.integers(2, 16), keep=st.booleans())
def test_contiguous_counts(tokens: int, context: int, keep: bool):
    rows, rest = pack.contiguous_rows(tokens, context, keep)
    predicted = max(0, tokens - 1)
    if keep:
        assert rows == -(-predicted // context)
        assert rest == (tokens if tokens == 1 else 0)
    else:
        assert rows == predicted // context
        assert rest == (predicted - rows * context if rows else tokens)


def test_contiguous_rows_overlap_by_one_token():
    rows = pack.pack_contiguous(np.arange(10, dtype=np.uint16), 4, padding_id=99)
    assert rows.tokens.tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, 99, 99, 99]]
    assert [lens.tolist() for lens in rows.doc_lens] == [[5], [5], [2]]


@given(texts=st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=8), heldout=st.floats(0.05, 0.5))
def test_the_tail_split_cuts_the_text_where_it_says(texts: list[str], heldout: float):
    split = schema.SplitSection(by="tail", heldout=heldout, test=0.1)
    whole = "".join(texts)
    bounds = tasks.tail_bounds(len(whole), split)
    start, parts, ends = 0, {"train": "", "heldout": "", "test": ""}, 0
    for text in texts:
        for piece in tasks.split_document(plain(text), split, start, bounds):
            parts[piece.split] += piece.text
            ends += piece.ends
        start += len(text)
    assert parts["train"] == whole[: bounds[0]]
    assert parts["heldout"] == whole[bounds[0] : bounds[1]]
    assert parts["test"] == whole[bounds[1] :]
    assert ends == len(texts)


def test_the_hash_split_depends_on_the_document_alone():
    split = schema.SplitSection(by="hash", heldout=0.3, test=0.2)
    names = Counter()
    for i in range(2000):
        text = f"document {i}"
        (piece,) = tasks.split_document(plain(text), split, start=i * 17, bounds=(0, 0))
        fraction = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64
        assert piece.split == ("test" if fraction < 0.2 else "heldout" if fraction < 0.5 else "train")
        names[piece.split] += 1
    assert abs(names["heldout"] - 600) < 80
    assert abs(names["test"] - 400) < 70
