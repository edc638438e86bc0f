"""The task metric: questions from masked rows, answers compared."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from llmtrain import shards, task
from llmtrain.config.schema import TaskSection
from llmtrain.shards import Rows, ShardInfo, ShardSet, SplitInfo
from llmtrain.world import World
from tests.support.bases import write_tokenizer


def split_of(folder: Path, rows: Rows) -> ShardSet:
    shards.write_shard(folder / "heldout-00000.arrow", rows)
    count = len(rows.tokens)
    info = ShardInfo(file="heldout-00000.arrow", size_bytes=0, sha256="", rows=count, tokens=0, max_id=0)
    split = SplitInfo(
        rows=count, tokens=0, targets=0, documents=0, text_bytes=0, text_tokens=0, tokens_dropped=0, shards=[info]
    )
    return ShardSet(folder, split, rows.tokens.shape[1] - 1)


def test_questions_end_where_the_last_completion_begins(tmp_path: Path):
    tokens = np.arange(24, dtype=np.uint16).reshape(2, 12)
    mask = np.zeros((2, 12), np.uint8)
    mask[0, 3:5] = 1  # the first document: a prompt of 3, a completion of 2
    mask[0, [7, 8, 10, 11]] = 1  # the second: two turns
    mask[1, 0:6] = 1  # no prompt at all
    lens = [np.array([5, 7], np.int32), np.array([6], np.int32)]
    found = task.questions(split_of(tmp_path, Rows(tokens, lens, mask)), limit=10)
    assert [(q.prompt_ids, q.answer_ids) for q in found] == [([0, 1, 2], [3, 4]), ([5, 6, 7, 8, 9], [10, 11])]
    assert len(task.questions(split_of(tmp_path, Rows(tokens, lens, mask)), limit=1)) == 1


def test_few_questions_come_from_all_over_the_split(tmp_path: Path):
    rows = Rows(np.full((100, 4), 7, np.uint16), [np.array([4], np.int32)] * 100, np.zeros((100, 4), np.uint8))
    rows.tokens[:, 0] = np.arange(100)
    assert rows.loss_mask is not None
    rows.loss_mask[:, 2:] = 1
    split = split_of(tmp_path, rows)
    asked = [question.prompt_ids[0] for question in task.questions(split, limit=10)]
    assert all(1 <= sum(low <= row < low + 20 for row in asked) <= 3 for low in range(0, 100, 20))
    assert sorted(question.prompt_ids[0] for question in task.questions(split, limit=100)) == list(range(100))


def test_where_nothing_was_asked_there_is_no_score():
    assert task.Tally().scores() == {}


@pytest.mark.parametrize(
    ("text", "number"), [("34.00", 34.0), ("about $1,234.5 or 7", 1234.5), ("-3", -3.0), (".5", 0.5), ("none", None)]
)
def test_numbers(text: str, number: float | None):
    assert task.number_in(text) == number


@pytest.mark.parametrize(
    ("text", "numeric"), [("34.00", True), (" $1,234 ", True), ("12%", True), ("34 dollars", False), ("", False)]
)
def test_what_counts_as_a_numeric_completion(text: str, numeric: bool):
    assert task.is_numeric(text) == numeric


def test_the_tally():
    tally = task.Tally()
    for reference, answer in [("10.00", "12"), ("10.00", "no idea"), ("yes", "yes "), ("10.00", "10.00")]:
        tally.add(reference, answer)
    assert tally.scores() == {
        "task_exact_match": 0.5,
        "task_numbers_given": pytest.approx(2 / 3),
        "task_mean_absolute_error": 1.0,
    }
    words = task.Tally()
    words.add("yes", "no")
    assert words.scores() == {"task_exact_match": 0.0}


class Parrot:
    """Says the ids that it was given, then the end."""

    def __init__(self, says: list[int]):
        self._left = [*says, 0]

    def next_logits(self, input_ids: Tensor) -> Tensor:
        logits = torch.zeros(512)
        logits[self._left.pop(0)] = 1.0
        return logits


def test_answers_are_spread_over_ranks_and_added_up(tmp_path: Path):
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    right, wrong = tokenizer.encode("self").ids, tokenizer.encode("other").ids
    asked = [task.Question([5], right), task.Question([6], wrong), task.Question([7], right)]
    section = TaskSection(samples=3, max_tokens=20)
    alone = World(0, 1, 0, torch.device("cpu"))
    scores, pairs = task.answer(lambda: Parrot(right), asked, tokenizer, 0, section, alone)
    assert scores == {"task_exact_match": pytest.approx(2 / 3)}
    assert [answer for _, answer in pairs] == ["self"] * 3
    short = TaskSection(samples=3, max_tokens=1)
    assert len(right) > 0
    _, pairs = task.answer(lambda: Parrot([*right, *right]), asked, tokenizer, 0, short, alone)
    assert all(len(tokenizer.encode(answer).ids) <= 1 for _, answer in pairs)


def test_an_end_of_text_that_is_not_flagged_as_special_is_no_part_of_the_answer(tmp_path: Path):
    write_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    spec = json.loads(file.read_text())
    spec["added_tokens"][0]["special"] = False
    file.write_text(json.dumps(spec))
    tokenizer = Tokenizer.from_file(str(file))
    right, number = tokenizer.encode("self").ids, tokenizer.encode("12").ids
    assert tokenizer.decode([*right, 0]) != "self"
    alone, section = World(0, 1, 0, torch.device("cpu")), TaskSection(samples=1, max_tokens=20)
    scores, _ = task.answer(lambda: Parrot(right), [task.Question([5], [*right, 0])], tokenizer, 0, section, alone)
    assert scores == {"task_exact_match": 1.0}
    scores, _ = task.answer(lambda: Parrot(number), [task.Question([5], [*number, 0])], tokenizer, 0, section, alone)
    assert scores["task_mean_absolute_error"] == 0.0


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_each_question_is_answered_by_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int):
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = [tokenizer.encode(word).ids for word in ("self", "other", "return")]
    asked = [task.Question([5 + number], answer) for number, answer in enumerate(ids)]
    sums: list[list[float]] = []
    monkeypatch.setattr(World, "sum_floats", lambda _, values: sums.append(values) or values)
    for rank in range(ranks):
        world = World(rank, ranks, 0, torch.device("cpu"))
        task.answer(lambda: Parrot(ids[0]), asked, tokenizer, 0, TaskSection(samples=3, max_tokens=20), world)
    answered, exact = (sum(of_rank[place] for of_rank in sums) for place in (0, 1))
    assert (answered, exact) == (3, 1)
