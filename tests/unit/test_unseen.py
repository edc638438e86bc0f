"""What training sees of records otherwise than one may think: it is told; and where a chat template fails."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tokenizers import Tokenizer

from launcher.sharding import tasks, unseen
from launcher.sharding.build import Built, build
from launcher.sharding.show import describe, documents, show_samples
from llmtrain.config import RunConfig, load_config
from llmtrain.errors import SourceError, TokenizerError
from tests.support.asked_runs import tuned_tokenizer

PLAIN = (
    "{% for m in messages if m.role != 'tool' %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] | trim }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FULL = (
    "{{ tools | tojson if tools else '' }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if 'tool_calls' in m %}{{ m.tool_calls | length }}{{ m.tool_calls | tojson }}{% endif %}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALL = [{"type": "function", "function": {"name": "get", "arguments": {"a": 1}}}]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


GOOD = {"messages": [user("Hi"), says("Hello.")]}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tasks._encoders.clear()


def configure(source: str, format: str, template: str | None = None) -> RunConfig:
    if not Path("tuned").exists():
        tuned_tokenizer(Path("tuned"), template)
    given = [
        f"data.sources=[{source}]", f"data.format={format}", "data.tokenizer={kind: folder, path: tuned}",
        "data.split={by: tail, heldout: 0.2, test: 0.0}", "model.context=256", "data.dir=shards",
    ]  # fmt: skip
    return load_config(None, given)[0]


def on(records: list[Any], format: str, template: str | None = None) -> RunConfig:
    Path("a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return configure("{kind: jsonl, paths: [a.jsonl]}", format, template)


def warnings(built: Built) -> list[str]:
    return [line.removeprefix("warning    ") for line in describe(built) if line.startswith("warning")]


def first_text(built: Built) -> str:
    tokenizer = Tokenizer.from_file(str(built.folder.tokenizer / "tokenizer.json"))
    return tokenizer.decode(next(documents(built.folder, "train", 1)).ids.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (PLAIN.replace("m.content.split", "(m.content + 1).split"), "TypeError: "),
        (
            FULL.replace("{{ m.content }}", "{{ m.content if loop.index < 3 else raise_exception('no more') }}"),
            "no more",
        ),
    ],
)
def test_a_template_that_fails_names_the_record(template: str, why: str):
    long = {"messages": [*GOOD["messages"], *GOOD["messages"]]}
    config = on([*([] if "Type" in why else [GOOD, GOOD]), long, GOOD], "{kind: chat}", template)
    with pytest.raises(TokenizerError) as caught:
        build(config, workers=1)
    place = "a.jsonl:1" if "Type" in why else "a.jsonl:3"
    assert str(caught.value).startswith(f"{place}: the chat template fails: {why}")


def test_keys_that_arrow_filled_in_are_not_there():
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [GOOD] * 9 + [{"messages": [user("w"), says("call", tool_calls=CALL), says("done")]}]
    pq.write_table(pa.Table.from_pylist(rows), "a.parquet")
    built = build(configure("{kind: parquet, paths: [a.parquet]}", "{kind: chat}", FULL), workers=1)
    assert first_text(built) == "<s><|user|>Hi<|assistant|>Hello.<|end|>".removeprefix("<s>")
    assert warnings(built) == []


def test_what_a_template_leaves_out_is_counted():
    records = [
        GOOD,
        {"messages": [user("q"), says("<think>\nlong\n</think>\n\nanswer")]},
        {"messages": [user("w"), says("call", tool_calls=CALL), {"role": "tool", "content": "22"}, says("It is 2")]},
        {**GOOD, "tools": CALL},
        {**GOOD, "tools": json.dumps(CALL)},
        {"messages": [*GOOD["messages"], user("what comes after the last answer")], "tools": None},
        *[{**GOOD, "tools": "hammer"}] * 4,
    ]
    config = on(records, "{kind: chat}", PLAIN)
    built = build(config, workers=1)
    content, tools, calls = warnings(built)
    assert content.startswith("in 2 of 10 chats the template leaves out what a message says")
    assert tools.startswith("in 2 of 10 chats the template makes nothing of 'tools'")
    assert calls.startswith("in 1 of 10 chats the template makes nothing of 'tool_calls'")

    (Path("tuned") / "chat_template.jinja").write_text(FULL)
    built = build(config, workers=1, force=True)
    assert warnings(built) == []
    assert first_text(build(on([records[3]] * 10, "{kind: chat}"), workers=1, force=True)).startswith('[{"type": "func')


def test_a_message_that_is_written_as_json_is_written():
    said = [user('say "é"\n'), says("ok")]
    for written in ('<say "é">ok', '"say \\"é\\"" ok', '"say \\"\\u00e9\\"" ok'):
        assert unseen.is_written(said, written)
    assert not unseen.is_written(said, "say ok")


def test_special_tokens_as_text_are_counted():
    pairs = [{"prompt": f"<|user|>Hi {n}", "completion": "x"} for n in range(6)] + [{"prompt": "a", "completion": "b"}]
    pairs += [{"prompt": "a", "completion": "</s>"}, {"prompt": "<|x|> <s", "completion": "<|>"}]
    (told,) = warnings(build(on(pairs, "{kind: completion}"), workers=1))
    assert told.startswith("7 documents hold the text of a special token (<|user|>, </s>): kept as plain text")
    assert "data.format.kind=chat" in told

    Path("a.txt").write_text("some words\n" * 50 + "<|end|>" + "more words\n" * 50)
    (told,) = warnings(build(configure("{kind: text, paths: [a.txt]}", "{kind: text}"), workers=1, force=True))
    assert told.startswith("1 documents hold the text of a special token (<|end|>)")

    template = '{kind: instruction, input: "", template_without_input: "<|user|>{instruction}\\n"}'
    (*_, told) = warnings(build(on([{"instruction": "a", "output": "b"}] * 9, template), workers=1, force=True))
    assert told.startswith("data.format.template holds the text of a special token (<|user|>): kept as plain text")


def test_special_tokens_are_shown_as_such():
    pairs = [{"prompt": "say <|end|>", "completion": " <|end|> now"}] * 10
    folder = build(on(pairs, "{kind: completion}"), workers=1).folder
    out = io.StringIO()
    show_samples(folder, 1, Console(file=out, width=200, color_system=None))
    assert "\u27e8<s>\u27e9say <|end|>\u27e6 <|end|> now\u27e8<|end|>\u27e9\u27e7" in out.getvalue()
    out = io.StringIO()
    show_samples(folder, 1, Console(file=out, width=200, force_terminal=True, color_system="standard"))
    assert "\x1b[1;7;32m<|end|>\x1b[0m" in out.getvalue()
    assert "\x1b[1;32m <|end|> now\x1b[0m" in out.getvalue()


@pytest.mark.parametrize(
    ("text", "why"),
    [('{"text": ' + "9" * 5000 + "}", "a number of more than 4,300 digits"), ("[" * 200_000, "nested too deeply")],
)
def test_json_that_python_does_not_read_names_the_line(text: str, why: str):
    Path("a.jsonl").write_text('{"text": "one"}\n' + text + "\n")
    Path("a.json").write_text(text)
    for source, place in (
        ("{kind: jsonl, paths: [a.jsonl]}", "a.jsonl:2"),
        ("{kind: json, paths: [a.json]}", "a.json"),
    ):
        with pytest.raises(SourceError) as caught:
            build(configure(source, "{kind: text}"), workers=1, force=True)
        assert str(caught.value).startswith(f"{place}: ")
        assert why in str(caught.value)
