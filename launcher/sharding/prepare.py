"""The beginning of a build: measure the text, train or load the tokenizer, prove the fast one.

What is found is kept in the work folder: a build that goes on, and jobs on other machines, read it from there.
"""

import contextlib
import functools
import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from launcher.sharding import tasks, tokenize
from launcher.sharding.processes import RunAll
from launcher.sharding.progress import ShardProgress
from launcher.sharding.readers import Unit
from launcher.sharding.records import Found
from launcher.sharding.work import Plan, check_work, not_prepared
from llmtrain import files
from llmtrain.config.data_sections import DataSection

_SLICE = 16_384
"""Characters per slice (at most); a slice goes into the tokenizer's sample whole or not at all."""
_PROOF_TASKS, _PROOF_TEXTS, _PROOF_CHARACTERS = 8, 8, 8192


@dataclass(frozen=True)
class Prepared:
    """What tokenising needs beside the tokenizer."""

    starts: list[int]
    """Where each task begins in the whole text, in characters."""
    bounds: tuple[int, int]
    """Of the splits, in characters (`tail` alone uses both)."""
    fast: bool
    """Whether tiktoken may do the work."""


def prepare(plan: Plan, run_all: RunAll[Any], progress: ShardProgress) -> Prepared:
    """Do what is not done yet; nobody else may be at work in the folder."""
    counts = _read_counts(plan) or _measure(plan, run_all, progress)
    if _read_fast(plan) is None:
        starts, bounds = _place_in_text(plan, counts)
        progress.stage("tokenizer", _training_bytes(plan))
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(plan.tokenizer)
        tokenize.prepare(plan.config.data, plan.tokenizer, _training_texts(plan, starts, bounds, progress))
        fast = tokenize.same_ids(plan.tokenizer, _proof_texts(plan, starts, bounds))
        for file in plan.tokenizer.iterdir():
            files.sync(file)
        files.write_atomic(plan.work / "tokenizer-done", json.dumps(fast))
    return read_prepared(plan)


def read_prepared(plan: Plan) -> Prepared:
    """What an earlier job has found.

    Raises:
        UserError: none has finished.
        DataMismatch: it worked on something else.
    """
    check_work(plan)
    counts, fast = _read_counts(plan), _read_fast(plan)
    if counts is None or fast is None:
        raise not_prepared(plan)
    return Prepared(*_place_in_text(plan, counts), fast)


def _read_counts(plan: Plan) -> list[int] | None:
    """Characters of each task; None where they have to be counted first."""
    if plan.config.data.split.by == "hash":
        return [0] * len(plan.tasks)
    file = plan.work / "counts.json"
    return json.loads(file.read_text()) if file.exists() else None


def _read_fast(plan: Plan) -> bool | None:
    """Whether tiktoken gives the tokenizer's ids; None where there is no tokenizer yet."""
    file = plan.work / "tokenizer-done"
    return bool(json.loads(file.read_text())) if file.exists() else None


def _count(data: DataSection, numbered: tuple[int, list[Unit]]) -> tuple[int, int]:
    return numbered[0], tasks.count_characters(data, numbered[1])


def _measure(plan: Plan, run_all: RunAll[Any], progress: ShardProgress) -> list[int]:
    """Count the characters of each task."""
    progress.stage("measure", sum(plan.sizes))
    counts = [0] * len(plan.tasks)
    for number, count in run_all(functools.partial(_count, plan.config.data), list(enumerate(plan.tasks))):
        counts[number] = count
        progress.advance(plan.sizes[number])
    files.write_atomic(plan.work / "counts.json", json.dumps(counts))
    return counts


def _place_in_text(plan: Plan, counts: list[int]) -> tuple[list[int], tuple[int, int]]:
    """Where each task begins, and the bounds of the splits; zeros where a document's hash decides."""
    starts = [0, *np.cumsum(counts).tolist()]
    return starts[:-1], tasks.tail_bounds(starts[-1], plan.config.data.rest_split)


def _training_bytes(plan: Plan) -> int:
    chosen = plan.config.data.tokenizer
    return min(chosen.train_bytes, sum(plan.sizes)) if chosen.kind == "train" else 0


def _training_texts(plan: Plan, starts: list[int], bounds: tuple[int, int], progress: ShardProgress) -> Iterator[str]:
    """Text of the training split, at most `train_bytes` of it, taken evenly from the whole.

    In slices, so that one long document is neither all of the sample nor none of it.
    """
    data = plan.config.data
    left = data.tokenizer.train_bytes if data.tokenizer.kind == "train" else 0
    share = min(1.0, left / max(1, sum(plan.sizes)))
    width, owed = max(256, min(_SLICE, left // 8)), 0.0
    for start, task in zip(starts, plan.tasks, strict=True):
        for piece in tasks.read_pieces(data, task, start, bounds, Found()):
            for first in range(0, len(piece.text) if piece.split == "train" else 0, width):
                text = piece.text[first : first + width]
                size = len(text.encode())
                owed += size * share
                if owed >= size / 2 and size <= left:
                    owed, left = owed - size, left - size
                    progress.advance(size)
                    yield text


def _proof_texts(plan: Plan, starts: list[int], bounds: tuple[int, int]) -> Iterator[str]:
    """Some documents from all over the corpus, on which the fast tokenizer has to prove itself."""
    step = max(1, len(plan.tasks) // _PROOF_TASKS)
    for start, task in zip(starts[::step], plan.tasks[::step], strict=True):
        pieces = tasks.read_pieces(plan.config.data, task, start, bounds, Found())
        yield from (piece.text[:_PROOF_CHARACTERS] for piece in itertools.islice(pieces, _PROOF_TEXTS))
