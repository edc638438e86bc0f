"""Samples that are cut to fit, at every length: what stays, what is learned of it, and how many bytes that is."""

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from launcher.sharding.build import build
from launcher.sharding.records import Document
from launcher.sharding.samples import NotUsable, Sample, SampleMaker
from launcher.sharding.tokenize import Encoder
from llmtrain.config import data_sections as schema
from llmtrain.config import load_config
from tests.support.bases import write_tokenizer

EOS, BOS, BOT = "<|endoftext|>", "<s>", "<|bot|>"
WRITES_BOS = (
    BOS + "{% for m in messages %}{% if m.role == 'assistant' %}" + BOT + "{{ m.content }}{{ eos_token }}"
    "{% else %}\n[{{ m.role }}] {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + BOT + "{% endif %}"
)


@pytest.fixture(scope="module", params=[True, False], ids=["trimmed offsets", "offsets"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It puts <s> before a text, as Llama's does; with GPT-2's `trim_offsets`, and without."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.add_special_tokens([BOS, BOT])
    bos = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, own.token_to_id(BOS))])  # pyright: ignore[reportAttributeAccessIssue]
    level = processors.ByteLevel(trim_offsets=request.param)
    own.post_processor = processors.Sequence([level, bos])  # pyright: ignore[reportAttributeAccessIssue]
    own.save(str(folder / "tokenizer.json"))
    return folder


TURNS = [
    {"role": "user", "content": "What is the first   number?"}, {"role": "assistant", "content": "It is one, né."},
    {"role": "user", "content": "And then the next of them?"}, {"role": "assistant", "content": "Two follows it."},
    {"role": "user", "content": "So the last?"}, {"role": "assistant", "content": "Ten."},
]  # fmt: skip
ANSWERS = [turn["content"] for turn in TURNS if turn["role"] == "assistant"]


def make(tokenizer: Path, format: schema.Format, record: dict[str, Any], limit: int = 10_000) -> Sample:
    maker = SampleMaker(format, Encoder(tokenizer, fast=False), tokenizer, limit, Counter())
    return maker.make(Document("", record, lambda: "here"))


def at_every_length(tokenizer: Path, format: schema.Format, record: dict[str, Any]) -> Iterator[tuple[Sample, Sample]]:
    """(cut, whole), from one token too long to the shortest that can be."""
    whole = make(tokenizer, format, record)
    assert not whole.cut
    for limit in range(len(whole.ids) - 1, 0, -1):
        try:
            yield make(tokenizer, format, record, limit), whole
        except NotUsable:
            assert limit < 25
            return


def runs(tokenizer: Path, sample: Sample) -> list[str]:
    """The text of each stretch that is learned."""
    decoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    edges = [0, *(np.flatnonzero(np.diff(sample.learned)) + 1).tolist(), len(sample.ids)]
    return [
        decoder.decode(sample.ids[a:b].tolist(), skip_special_tokens=False)
        for a, b in itertools.pairwise(edges)
        if sample.learned[a]
    ]


def text_bytes(tokenizer: Path, sample: Sample) -> int:
    """Of the learned ids; a character of which a part was cut off does not count."""
    decoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    text = decoder.decode(sample.ids[sample.learned == 1].tolist(), skip_special_tokens=True)
    return len(text.lstrip("\ufffd").encode())


CHATS = {
    "plain": schema.ChatFormat(kind="chat", overlong="cut_prompt"),
    "writes <s>": schema.ChatFormat(kind="chat", overlong="cut_prompt", template=WRITES_BOS),
    "no end": schema.ChatFormat(
        kind="chat", overlong="cut_prompt", append_eos=True, template=WRITES_BOS.replace("{{ eos_token }}", "")
    ),
}


@pytest.mark.parametrize("chat", CHATS)
def test_of_a_cut_chat_whole_answers_are_learned_alone(tokenizer: Path, chat: str):
    """An answer that lost its question, or its own beginning, may still be read, but is not learned."""
    format = CHATS[chat]
    whole = make(tokenizer, format, {"messages": TURNS})
    assert runs(tokenizer, whole) == [answer + EOS for answer in ANSWERS]
    counts: list[int] = []
    for cut, _ in at_every_length(tokenizer, format, {"messages": TURNS}):
        learned = runs(tokenizer, cut)
        assert learned == [answer + EOS for answer in ANSWERS[-len(learned) :]]
        assert cut.learned_bytes == sum(len(answer.encode()) for answer in ANSWERS[-len(learned) :])
        assert not cut.learned[:2].any()  # <s>, and what then begins is a question or what is left of something
        counts.append(len(learned))
    assert counts == sorted(counts, reverse=True)
    assert set(counts) == {1, 2, 3}


@pytest.mark.parametrize("completion_only", [True, False])
@pytest.mark.parametrize("chat", CHATS)
def test_what_the_tokenizer_puts_before_a_text_stays(tokenizer: Path, chat: str, completion_only: bool):
    """Also where the template wrote it."""
    format = CHATS[chat].model_copy(update={"completion_only": completion_only})
    start = Encoder(tokenizer, fast=False).prefix_ids
    assert len(start) == 1
    for cut, whole in at_every_length(tokenizer, format, {"messages": TURNS}):
        assert whole.ids[:2].tolist() != start * 2
        assert cut.ids.tolist() == [*start, *whole.ids[len(whole.ids) - len(cut.ids) + 1 :].tolist()]
        assert cut.learned[0] == whole.learned[0] == 0


FORMATS: dict[str, tuple[schema.Format, dict[str, Any]]] = {
    **{name: (format, {"messages": TURNS}) for name, format in CHATS.items()},
    "completion": (
        schema.CompletionFormat(kind="completion", overlong="cut_prompt"),
        {"prompt": "A longer\n\n  prompt, of 12 words,\tnaïve 🙂 and with an end: ", "completion": "yés"},
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_those_of_the_text_that_is_kept(tokenizer: Path, name: str):
    format, record = FORMATS[name]
    format = format.model_copy(update={"completion_only": False})
    whole = make(tokenizer, format, record)
    assert whole.learned_bytes == text_bytes(tokenizer, whole)
    smallest = whole.learned_bytes
    for cut, _ in at_every_length(tokenizer, format, record):
        assert cut.learned_bytes == text_bytes(tokenizer, cut)
        smallest = min(smallest, cut.learned_bytes)
    assert smallest < 25


def test_a_special_token_that_the_template_writes_is_no_text(tokenizer: Path, tmp_path: Path):
    template = WRITES_BOS.replace("{{ m.content }}{{ eos_token }}", f"{{{{ m.content }}}}{BOT}{{{{ eos_token }}}}")
    format = schema.ChatFormat(kind="chat", template=template)
    sample = make(
        tokenizer,
        format,
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi 301"}]},
    )
    assert runs(tokenizer, sample) == [f"hi 301{BOT}{EOS}"]
    assert sample.learned_bytes == len("hi 301")
    written_out = make(
        tokenizer, schema.CompletionFormat(kind="completion"), {"prompt": "a", "completion": f"The token {BOT} ends."}
    )
    assert written_out.learned_bytes == len(f"The token {BOT} ends.")


def test_the_bytes_reach_the_manifest(tokenizer: Path, tmp_path: Path):
    lines = [
        f'{{"messages": [{{"role": "user", "content": "hello"}}, {{"role": "assistant", "content": "hi {n}"}}]}}\n'
        for n in range(40)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(lines))
    config, _ = load_config(
        None,
        [f"data.sources=[{{kind: jsonl, paths: ['{tmp_path}/chats.jsonl']}}]", "data.format={kind: chat}",
         f"data.tokenizer={{kind: folder, path: '{tokenizer}'}}", f"data.dir={tmp_path}/shards", "model.context=64",
         "data.split={by: tail, heldout: 0.2, test: 0.0}"],
    )  # fmt: skip
    splits = build(config, workers=1).folder.manifest.splits.values()
    assert sum(split.text_bytes for split in splits) == sum(len(f"hi {n}") for n in range(40))


def test_a_text_that_goes_on_in_the_next_split_has_one_beginning_and_one_end(tokenizer: Path, tmp_path: Path):
    (tmp_path / "text.txt").write_text("one word after another, " * 400)
    config, _ = load_config(
        None,
        [f"data.sources=[{{kind: text, paths: ['{tmp_path}/text.txt']}}]", f"data.dir={tmp_path}/shards",
         f"data.tokenizer={{kind: folder, path: '{tokenizer}'}}", "data.split={by: tail, heldout: 0.3, test: 0.2}",
         "data.packing=bestfit", "model.context=64"],
    )  # fmt: skip
    folder, own = build(config, workers=1).folder, Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    found: dict[str, list[str]] = {}
    for name in folder.manifest.splits:
        rows = folder.split(name).rows(np.arange(folder.manifest.splits[name].rows))
        ids = [row[: lens.sum()].tolist() for row, lens in zip(rows.tokens, rows.doc_lens, strict=True)]
        found[name] = [token for row in ids for token in (BOS, EOS) if own.token_to_id(token) in row]
    assert found == {"train": [BOS], "heldout": [], "test": [EOS]}
