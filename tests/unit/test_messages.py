"""Chats in the shapes of other tools: calls of tools, weights, ShareGPT, parts; and what is refused, all at once."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from launcher.sharding import messages, sources, tasks
from launcher.sharding.build import Built, build
from launcher.sharding.records import Document
from launcher.sharding.samples import SampleMaker
from launcher.sharding.show import describe
from launcher.sharding.tokenize import Encoder
from llmtrain import log
from llmtrain.config import RunConfig, load_config
from llmtrain.config import data_sections as schema
from llmtrain.errors import SourceError
from tests.support.bases import write_tokenizer

ROOT = Path(__file__).parents[2]
QWEN = str(ROOT / "configs/templates/qwen3.jinja")
END = "<|im_end|>"
CALL = {"type": "function", "function": {"name": "get", "arguments": {"a": 1}}}
CALLED = '<tool_call>\n{"name": "get", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose texts end as Qwen3's do."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, 400)
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.add_special_tokens(["<|im_start|>", END])
    own.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": END}))
    return folder


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tasks._encoders.clear()


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


GOOD = {"messages": [user("Hi"), says("Hello.")]}


@pytest.fixture
def learned(tokenizer: Path) -> Callable[..., list[str]]:
    """The stretches of a record that are learned."""

    def make(record: dict[str, Any], template: str | None = QWEN, field: str = "messages", **more: Any) -> list[str]:
        format = schema.ChatFormat(kind="chat", template=template, messages=field, **more)
        maker = SampleMaker(format, Encoder(tokenizer, fast=False), tokenizer, 10_000, Counter())
        sample = maker.make(Document("", record, lambda: "here"))
        decoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        found, inside = [[]], False
        for number, flag in zip(sample.ids.tolist(), sample.learned.tolist(), strict=True):
            if flag and not inside:
                found.append([])
            inside = bool(flag)
            if flag:
                found[-1].append(number)
        return [decoder.decode(ids, skip_special_tokens=False) for ids in found[1:]]

    return make


def configure(tokenizer: Path, records: list[Any], format: str = "{kind: chat}") -> RunConfig:
    Path("a.jsonl").write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    given = [
        "data.sources=[{kind: jsonl, paths: [a.jsonl]}]", f"data.format={format}", "data.dir=shards",
        f"data.tokenizer={{kind: folder, path: '{tokenizer}'}}", "data.split={by: tail, heldout: 0.2, test: 0.0}",
        "model.context=256",
    ]  # fmt: skip
    return load_config(None, given)[0]


def refused(config: RunConfig) -> str:
    with pytest.raises(SourceError) as caught:
        build(config, workers=1)
    return str(caught.value)


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_an_assistant_that_only_calls_tools(learned: Callable[..., list[str]], content: dict[str, Any]):
    """As OpenAI and TRL write it."""
    call = {"role": "assistant", "tool_calls": [CALL], **content}
    record = {"messages": [user("What is a?"), call, {"role": "tool", "content": "1"}, says("It is 1.")]}
    think = "<think>\n\n</think>\n\n"
    assert learned(record) == [f"{think}{CALLED}{END}", f"{think}It is 1.{END}"]
    with pytest.raises(SourceError) as caught:
        learned(record, template=None)  # the plain one makes nothing of calls
    assert "here: the assistant says nothing in message 2, and the chat template makes nothing of its 'tool_c" in str(
        caught.value
    )


@pytest.mark.parametrize("completion_only", [True, False])
@pytest.mark.parametrize("none", [0, 0.0, False])
def test_an_answer_of_no_weight_is_not_learned(learned: Callable[..., list[str]], completion_only: bool, none: float):
    chat = [user("q"), says("bad", weight=none), user("again"), says("good", weight=1), user("so?"), says("bad too")]
    chat[-1]["weight"] = none
    found = learned({"messages": chat}, template=None, completion_only=completion_only)
    assert found[-1].endswith(f"good{END}")
    assert not any("bad" in text for text in found)
    assert len(found) == (1 if completion_only else 2)


@pytest.mark.parametrize(
    ("weights", "why"),
    [((0, 0), "all that the assistant says has weight 0"), ((1, 0.5), "message 4 (assistant) has weight 0.5; what is")],
)
def test_other_weights_are_refused(learned: Callable[..., list[str]], weights: tuple[float, ...], why: str):
    chat = [turn for weight in weights for turn in (user("q"), says("a", weight=weight))]
    with pytest.raises(SourceError, match="here: ") as caught:
        learned({"messages": chat})
    assert why in str(caught.value)


def test_what_is_learned_of_other_shapes_is_the_same(learned: Callable[..., list[str]]):
    ours = {"messages": [{"role": "system", "content": "Be brief."}, user("Hi there"), says("Hello.")]}
    parts = [{**m, "content": [{"type": "text", "text": t} for t in (m["content"][:2], m["content"][2:])]}
             for m in ours["messages"]]  # fmt: skip
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    sharegpt = [{"from": names[m["role"]], "value": m["content"]} for m in ours["messages"]]
    expected = learned(ours)
    assert expected == [f"<think>\n\n</think>\n\nHello.{END}"]
    assert learned({"messages": parts}) == expected
    assert learned({"conversations": sharegpt}, field="conversations") == expected


def test_messages_of_our_shape_are_not_touched():
    given = [user("Hi"), says("Hello.", name="x")]
    assert all(a is b for a, b in zip(messages.read(given, "messages", lambda: "here"), given, strict=True))


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("Hi", "content' as text, and is text"),
        (["Hi"], ": message 1 is text "),
        ([user("Hi"), {"role": "assistant"}], ": message 2 (assistant) has no 'content'; it has 'role' ("),
        ([{"speaker": "a", "text": "b"}], ": message 1 has no 'role'; it has 'speaker', 'text' "),
        ([{"from": "function_call", "value": "b"}], ": message 1 is from 'function_call'; known are human, gpt, "),
        ([{"from": "gpt", "text": "b"}], ": message 1 has no 'value' beside 'from'; it has 'from', 'text' "),
        ([{"role": "user", "content": 3}], ": message 1 (user) has a number as its 'content' "),
        ([{"role": "user", "content": [{"type": "image"}]}], ": message 1 has a part of type 'image' in its 'content'"),
    ],
)
def test_what_was_found_instead_is_said(value: Any, why: str):
    with pytest.raises(SourceError) as caught:
        messages.read(value, "messages", lambda: "here")
    assert str(caught.value).startswith("here: 'messages' must be a list of messages with 'role' and 'content' as text")
    assert why in str(caught.value)


def test_a_field_of_another_name_is_proposed(tokenizer: Path):
    said = refused(configure(tokenizer, [{"conversations": GOOD["messages"], "id": 1}]))
    assert said.endswith("no field 'messages'; there are: conversations, id. Set data.format.messages=conversations")


def test_prompts_and_completions_of_messages_are_named(tokenizer: Path):
    said = refused(configure(tokenizer, [{"prompt": [user("q")], "completion": [says("a")]}], "{kind: completion}"))
    assert "a.jsonl:1: 'prompt' holds a list, not text. These are messages: make one list of them all and " in said


def test_the_script_of_the_documents_makes_chats(learned: Callable[..., list[str]]):
    script = (ROOT / "docs/finetuning.md").read_text().split("```python\n")[1].split("```")[0]
    records = [
        {"prompt": [user("q"), says("old"), user("p")], "completion": [says("new")]},
        {"instruction": "p", "input": "x", "output": "new", "system": "s", "history": [["q", "old"]]},
        {"instruction": "p", "output": "new"},
    ]
    Path("old.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    exec(compile(script, "script", "exec"), {})
    made = [json.loads(line) for line in Path("chats.jsonl").read_text().splitlines()]
    assert [[m["role"][0] for m in chat["messages"]] for chat in made] == [list("uaua"), list("suaua"), list("ua")]
    said = [[text.removesuffix(END).split("\n")[-1] for text in learned(chat)] for chat in made]
    assert said == [["new"], ["old", "new"], ["new"]]


def test_turns_for_qwen_are_written_alike_with_and_without_a_next_one(learned: Callable[..., list[str]]):
    """`learned` would refuse them otherwise."""
    chat = [
        {"role": "system", "content": "Be brief."}, user("q"), says("<think>\nhm\n</think>\n\none"), user("q"),
        says("two", reasoning_content="well"), user("q"), says("three", tool_calls=[CALL, CALL]),
        {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}, says("four"),
    ]  # fmt: skip
    empty = "<think>\n\n</think>\n\n"
    expected = [
        f"<think>\nhm\n</think>\n\none{END}", f"<think>\nwell\n</think>\n\ntwo{END}",
        f"{empty}three\n{CALLED}\n{CALLED}{END}", f"{empty}four{END}",
    ]  # fmt: skip
    assert learned({"messages": chat}) == learned({"messages": chat, "tools": [CALL]}) == expected
    assert learned({"messages": chat[1:], "tools": [CALL]}) == expected


def warnings(built: Built) -> list[str]:
    return [line.removeprefix("warning    ") for line in describe(built) if line.startswith("warning")]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_fields_that_are_not_trained_on_are_told(tokenizer: Path, kind: str):
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [{"instruction": "p", "output": "new", "system": "s" if n else "", "history": []} for n in range(9)]
    config = configure(tokenizer, records, "{kind: instruction}")
    before = build(configure(tokenizer, [{**r, "system": ""} for r in records], "{kind: instruction}"), workers=1)
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), "a.parquet")
        config = config.model_copy(
            update={"data": config.data.model_copy(update={"sources": [
                schema.ParquetSource(kind="parquet", paths=["a.parquet"])]})}
        )  # fmt: skip
    else:
        config = configure(tokenizer, records, "{kind: instruction}")
    built = build(config, workers=1, force=True)
    told = [line for line in warnings(built) if "trained on" in line]
    assert told == [
        "8 of 9 records have something in 'system', which is not trained on; docs/finetuning.md makes chats of such "
        "records"
    ]
    assert built.folder.manifest.splits == before.folder.manifest.splits


def test_bad_records_are_told_together(tokenizer: Path):
    silent = {"messages": [user("q"), says("")]}
    config = configure(tokenizer, [GOOD, "{", silent, {"x": 1}, GOOD, silent, '"text"', silent])
    said = refused(config).split("\n")
    assert said[0] == "3 records cannot be used, and perhaps more after these:"  # counting the text reads them first
    assert said[1].startswith("  - a.jsonl:2: not JSON: ")
    assert said[2].startswith("  - a.jsonl:4: no field 'messages'; there are: x. ")
    assert said[3] == "  - a.jsonl:7: must be a JSON object, not text"
    said = refused(configure(tokenizer, [GOOD, silent, GOOD, silent, silent])).split("\n")
    assert said[0].startswith("3 records cannot be used")
    assert said[1].startswith("  - a.jsonl:2: the assistant says nothing in one of its messages")
    assert said[2:] == ["    The same at a.jsonl:4, a.jsonl:5"]
    assert not Path("shards/manifest.json").exists()


def test_of_very_many_bad_records_the_first_are_told(tokenizer: Path):
    said = refused(configure(tokenizer, [{"x": 1}] * 100)).split("\n")
    assert said[0].startswith("20 records cannot be used")
    assert said[1].startswith("  - a.jsonl:1: no field 'messages'")
    assert said[2] == f"    The same at {', '.join(f'a.jsonl:{n}' for n in range(2, 12))} and 9 more"


@pytest.mark.parametrize(
    ("kind", "content", "expected"),
    [
        ("csv", "prompt,completion\na,b\na,b,c\na\na,b\na,b,c\n", [3, 6]),
        ("json", json.dumps([1, {"prompt": "a", "completion": "b"}, {"prompt": "a"}, [], 2]), [0, 4]),
    ],
)
def test_bad_records_of_other_kinds_too(tokenizer: Path, kind: str, content: str, expected: list[int]):
    config = configure(tokenizer, [], "{kind: completion}")
    Path("a").write_text(content)
    source = f"data.sources=[{{kind: {kind}, paths: [a]}}]"
    config = load_config(None, [source, "data.format={kind: completion}", "data.dir=shards"])[0]
    said = refused(config)
    assert len([line for line in said.split("\n") if line.startswith("  - ")]) == (2 if kind == "csv" else 3)
    first, last = expected
    place = "a:{}" if kind == "csv" else "a: record {}"
    assert f"- {place.format(first)}: " in said
    assert f"The same at {place.format(last)}" in said


@pytest.mark.parametrize(
    ("paths", "told"),
    [
        (["a.txt", "a.txt"], "a.txt"), (["*.txt", "./a.txt"], "./a.txt"), (["*.txt", "*.txt"], "*.txt"),
        (["a.txt", "*.txt"], None), (["a.txt", "b.txt"], None),
    ],
)  # fmt: skip
def test_a_path_given_twice_is_told(monkeypatch: pytest.MonkeyPatch, paths: list[str], told: str | None):
    said: list[str] = []
    monkeypatch.setattr(log, "warn_once", said.append)
    for name in ("a.txt", "b.txt"):
        Path(name).write_text("words")
    sources.list_units([schema.TextSource(kind="text", paths=paths)], schema.TextFormat())
    assert [line.split(" is named twice and read once")[0] for line in said] == (
        [f"data       data.sources.0.paths: {told}"] if told else []
    )
