"""How often the model is right: answers to held-out prompts, generated and compared with the completions."""

import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from llmtrain.config.schema import SampleSection, TaskSection
from llmtrain.evaluate import Generator, continue_text
from llmtrain.shards import ShardSet
from llmtrain.world import World

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*)?\.?\d+")
_GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples spread evenly, however many there are
_NUMERIC = re.compile(r"\s*[$€£]?\s*[-+]?(?:\d[\d,]*)?\.?\d+\s*[%$€£]?\s*")
"""A completion that is a number and nothing else."""


@dataclass(frozen=True)
class Question:
    """A held-out sample: ids up to its last completion, and the completion."""

    prompt_ids: list[int]
    answer_ids: list[int]


def questions(split: ShardSet, limit: int) -> list[Question]:
    """Of so many documents of a split that have a prompt."""
    found: list[Question] = []
    for ids, learned in _documents(split):
        places = np.flatnonzero(learned)
        if len(places) and places[0] > 0:
            last = places[-1]
            begin = last - int(np.argmin(learned[: last + 1][::-1])) + 1  # after the last token that is not learned
            found.append(Question(ids[:begin].tolist(), ids[begin : last + 1].tolist()))
        if len(found) == limit:
            break
    return found


def _documents(split: ShardSet) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    # However few rows are read, they come from all over the split: `bestfit` begins with the longest documents.
    for row in np.argsort(np.arange(split.num_rows) * _GOLDEN % 1, kind="stable"):
        rows = split.rows(np.array([row]))
        if rows.loss_mask is None:
            return
        at = 0
        for length in rows.doc_lens[0].tolist():
            yield rows.tokens[0, at : at + length], rows.loss_mask[0, at : at + length]
            at += length


def number_in(text: str) -> float | None:
    """The first number in a text; commas group thousands."""
    found = _NUMBER.search(text)
    return None if found is None else float(found[0].replace(",", ""))


def is_numeric(text: str) -> bool:
    return _NUMERIC.fullmatch(text) is not None


@dataclass
class Tally:
    """Sums over answers."""

    asked: int = 0
    exact: int = 0
    numeric: int = 0
    numbers: int = 0
    error: float = 0.0

    def add(self, reference: str, answer: str) -> None:
        self.asked += 1
        self.exact += answer.strip() == reference.strip()
        if is_numeric(reference):
            self.numeric += 1
            wanted, given = number_in(reference), number_in(answer)
            if wanted is not None and given is not None:
                self.numbers += 1
                self.error += abs(wanted - given)

    def scores(self) -> dict[str, float]:
        """exact_match, if anything was asked; of numeric completions the mean absolute error of the numbers given, and
        how many gave one."""
        scores = {"task_exact_match": self.exact / self.asked} if self.asked else {}
        if self.numeric:
            scores["task_numbers_given"] = self.numbers / self.numeric
        if self.numbers:
            scores["task_mean_absolute_error"] = self.error / self.numbers
        return scores


def answer(
    make_generator: Callable[[], Generator],
    asked: list[Question],
    tokenizer: Tokenizer,
    eos_id: int,
    task: TaskSection,
    world: World,
) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """Collective (control group). Scores over all questions, and this rank's (prompt, answer) pairs.

    Rank r of R answers questions r, r + R, ...; always the likeliest token. A host sync for each token.
    """
    greedy = SampleSection(prompt="", tokens=task.max_tokens, temperature=0)
    tally, pairs = Tally(), list[tuple[str, str]]()
    for question in asked[world.rank :: world.size]:
        ids = continue_text(make_generator(), question.prompt_ids, greedy, seed=0, eos_id=eos_id)
        text = tokenizer.decode(list(ids))
        # Up to the end of the text, as the answer: not every tokenizer flags that token as one to leave out.
        wanted = itertools.takewhile(lambda token: token != eos_id, question.answer_ids)
        tally.add(tokenizer.decode(list(wanted)), text)
        pairs.append((tokenizer.decode(question.prompt_ids), text))
    sums = world.sum_floats([tally.asked, tally.exact, tally.numeric, tally.numbers, tally.error])
    whole = Tally(int(sums[0]), int(sums[1]), int(sums[2]), int(sums[3]), sums[4])
    return whole.scores(), pairs
