"""What a build tells people of their input: what is misspelt, of another encoding, too long or too little."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.sharding import build as building
from launcher.sharding import tasks, work
from launcher.sharding.build import build, build_part, prepare_build
from launcher.sharding.parts import Part
from launcher.sharding.progress import ShardProgress
from launcher.sharding.show import describe
from llmtrain import shards
from llmtrain.config import RunConfig, load_config
from llmtrain.errors import EncodingError, SourceError, TooLittleData, UserError
from tests.support.bases import write_tokenizer


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tasks._encoders.clear()  # each test's tokenizer may lie under the same path


def configure(source: str, *settings: str) -> RunConfig:
    small = ["data.tokenizer.vocab_size=260", "model.context=16", "data.split={by: tail, heldout: 0.2, test: 0.0}"]
    return load_config(None, [f"data.sources=[{source}]", *small, *settings])[0]


def refused(kind: type[UserError], config: RunConfig) -> str:
    with pytest.raises(kind) as caught:
        build(config, workers=1)
    return str(caught.value)


def write_records(records: list[Any], name: str = "a.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return f"{{kind: jsonl, paths: [{name}]}}"


PAIRS = [{"prompt": "word " * 30, "completion": f"yes {number}"} for number in range(20)]
LONG = "20 of 20 samples are longer than model.context + 1 tokens"


def test_samples_that_are_all_too_long_ask_for_a_longer_context():
    said = refused(TooLittleData, configure(write_records(PAIRS), "data.format={kind: completion}"))
    first, skipped = said.split("\n")
    assert f". {LONG}: use a longer model.context, or data.format.overlong=cut_prompt." in first
    assert "shorter" not in said
    assert "tail" not in said
    assert skipped == "skipped    20 documents: longer than model.context"


def test_also_where_cutting_the_prompt_is_not_enough():
    pairs = [{"prompt": "a", "completion": "word " * 30}] * 20
    said = refused(
        TooLittleData, configure(write_records(pairs), "data.format={kind: completion, overlong: cut_prompt}")
    )
    assert f". {LONG}, even without their prompts: use a longer model.context.\nskipped    20 documents: comp" in said


def test_too_long_samples_are_not_the_only_reason_where_some_fit():
    pairs = [*PAIRS[:3], *({"prompt": "a", "completion": "b"} for _ in range(17))]
    split = "data.split={by: hash, heldout: 0.0001, test: 0.0}"
    said = refused(TooLittleData, configure(write_records(pairs), "data.format={kind: completion}", split))
    assert "the heldout split has 0 tokens of 0 documents" in said
    assert ". 3 of 20 samples are longer than model.context + 1 tokens: use a longer" in said
    assert "Otherwise use more text, a larger data.split.heldout, or data.split.by=tail" in said


TAIL = "data.split.by=tail (few documents cannot be split by their hash)"


@pytest.mark.parametrize(
    ("settings", "name", "advice"),
    [
        (
            ["model.context=9000"],
            "train",
            "Use more text, a shorter model.context, or a smaller data.split.heldout",
        ),
        (
            ["model.context=9000", "data.split={by: hash, heldout: 0.1, test: 0.1}"],
            "train",
            "Use more text, a shorter model.context, or a smaller data.split.heldout or data.split.test",
        ),
        (
            ["data.split={by: hash, heldout: 0.1, test: 0.0}"],
            "heldout",
            f"Use more text, a larger data.split.heldout, or {TAIL}",
        ),
        (
            ["data.split={by: hash, heldout: 0.5, test: 0.000001}", r'data.sources.0.separator="\n"'],
            "test",
            f"Use more text, a larger data.split.test, data.split.test=0 (no test split), or {TAIL}",
        ),
        (
            ["data.split={by: hash, heldout: 0.9, test: 0.01}"],
            "train",
            f"Use more text, a shorter model.context, a smaller data.split.heldout or data.split.test, or {TAIL}",
        ),
    ],
)
def test_too_little_text_for_a_split(settings: list[str], name: str, advice: str):
    for first, file in enumerate(("a.txt", "b.txt", "c.txt")):
        Path(file).write_text("".join(f"some words of text, {number}\n" for number in range(first, 100, 3)))
    said = refused(TooLittleData, configure("{kind: text, paths: [a.txt, b.txt, c.txt]}", *settings))
    assert said.startswith(f"the {name} split has ")
    assert said.split("\n")[0].endswith(f" tokens. {advice}")


def test_too_little_text_leaves_no_folder_behind():
    Path("a.txt").write_text("some words")
    config = configure("{kind: text, paths: [a.txt]}", "model.context=1000")
    refused(TooLittleData, config)
    assert [path.name for path in Path("shards").iterdir() if path.suffix != ".lock"] == []


def test_but_keeps_what_is_not_its_own():
    Path("a.txt").write_text("some words of text, " * 100)
    build(configure("{kind: text, paths: [a.txt]}", "data.dir=mine"), workers=1)
    Path("mine/notes.txt").write_text("x")
    before = sorted(path.name for path in Path("mine").iterdir())
    with pytest.raises(TooLittleData):
        build(configure("{kind: text, paths: [a.txt]}", "data.dir=mine", "model.context=9000"), workers=1, force=True)
    assert sorted(path.name for path in Path("mine").iterdir()) == before
    shards.open_folder(Path("mine"))


def test_a_job_that_waited_makes_the_folder_again(monkeypatch: pytest.MonkeyPatch):
    """The one before it has removed it, for too little data."""
    Path("a.txt").write_text("some words of text, " * 100)
    original = work.make_plan

    def plan_and_lose_the_folder(config: RunConfig) -> work.Plan:
        plan = original(config)
        if plan.folder.exists():
            plan.folder.rmdir()
        return plan

    Path("mine").mkdir()
    monkeypatch.setattr(building, "make_plan", plan_and_lose_the_folder)
    assert build(configure("{kind: text, paths: [a.txt]}", "data.dir=mine"), workers=1).folder.manifest.splits


def _part(config: RunConfig, workers: int) -> object:
    return build_part(config, Part(0, 1), workers)


@pytest.mark.parametrize("job", [build, prepare_build, _part])
def test_sources_that_are_not_there_leave_no_folder_behind(job: Callable[..., object], tmp_path: Path):
    source = f"{{kind: text, paths: ['in/*.txt', gone.txt, '{tmp_path}/*.md']}}"
    with pytest.raises(SourceError) as caught:
        job(configure(source), workers=1)
    looked = f"(looked for it from {tmp_path.name}/, the working directory)"
    assert str(caught.value).split("\n  - ")[1:] == [
        f"in/*.txt: no file matches {looked}", f"gone.txt: no such file {looked}", f"{tmp_path}/*.md: no file matches",
    ]  # fmt: skip
    assert not Path("shards").exists()


GPT2_IDS, LETTERS = (np.array(ids, np.uint16).tobytes() for ids in (np.arange(257, 40_000, 7), [*range(65)] * 50))
CONVERTED = np.arange(0, 1000, dtype="<u2").tobytes().decode("latin1").encode()


@pytest.mark.parametrize("invalid", ["error", "replace", "skip"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.bin", GPT2_IDS),
        ("train.bin", LETTERS),  # valid UTF-8
        ("train.txt", LETTERS),
        ("converted.txt", CONVERTED),  # by iconv, as the advice on text says
        ("unmarked.txt", "some words of text".encode("utf-16-le")),
    ],
)
def test_token_ids_are_not_trained_on_as_text(name: str, content: bytes, invalid: str):
    Path(name).write_bytes(content)
    Path("good.txt").write_text("some words of text, " * 100)
    config = configure(f"{{kind: text, paths: [{name}, good.txt], invalid_utf8: {invalid}}}")
    if invalid == "skip":
        assert sum(build(config, workers=1).folder.manifest.skipped.values()) == 1
        return
    said = refused(EncodingError, config)
    assert said.startswith(f"{name}: not text. A .bin file of nanoGPT holds token ids")
    assert "enc.decode(np.fromfile(FILE, np.uint16))" in said


def test_text_with_a_stray_zero_is_text():
    Path("a.txt").write_text("some words of text, " * 50 + "\0" + "more words, " * 50)
    assert build(configure("{kind: text, paths: [a.txt]}"), workers=1).folder.manifest.skipped == {}


def test_a_folder_of_save_to_disk_is_named():
    import datasets

    datasets.Dataset.from_list([{"text": "some words of text"}] * 40).save_to_disk("saved")
    said = refused(SourceError, configure("{kind: huggingface, name: ./saved}"))
    source = "{kind: huggingface, name: arrow, data_files: ['saved/*.arrow']}"
    assert said.endswith(f". What save_to_disk wrote is read with {source}")
    assert build(configure(source), workers=1).folder.manifest.splits


RECORD = '{"text": "some words of text"}\n'
CONVERT = "convert the file (iconv -f latin1 -t utf-8 OLD > NEW), or "
DROP = CONVERT + "where it is UTF-8 but for a few bytes, drop those (iconv -c -f utf-8 -t utf-8 OLD > NEW)"


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("kind", ["text", "jsonl", "json", "csv"])
def test_another_unicode_is_named(kind: str, encoding: str):
    Path("a").write_bytes(f"\ufeff{RECORD}".encode(encoding))
    said = refused(EncodingError, configure(f"{{kind: {kind}, paths: [a]}}"))
    short = encoding[:6]
    assert said.startswith("a: not valid UTF-8 at byte ")
    assert said.endswith(f": it is {short.upper()}; convert the file (iconv -f {short} -t utf-8 OLD > NEW)")


@pytest.mark.parametrize(
    ("kind", "content", "expected"),
    [
        (
            "text",
            b"one\ntwo caf\xe9\n",
            f"11, in line 2; {CONVERT}set invalid_utf8: replace (or skip) on this text source",
        ),
        ("jsonl", f"{RECORD}{RECORD}".encode() + b'{"text": "caf\xe9"}', f"75, in line 3; {DROP}"),
        ("jsonl", b'\xef\xbb\xbf{"text": "caf\xe9"}', f"16, in line 1; {DROP}"),
        ("json", b'\xef\xbb\xbf[\n{"text": "caf\xe9"}]', f"18, in line 2; {DROP}"),
        ("csv", b"\xef\xbb\xbftext\ncaf\xe9\n", f"11, in line 2; {DROP}"),
    ],
)
def test_a_bad_byte_is_placed_and_the_advice_is_of_the_kind(kind: str, content: bytes, expected: str):
    Path("a").write_bytes(content)
    said = refused(EncodingError, configure(f"{{kind: {kind}, paths: [a]}}"))
    assert said == f"a: not valid UTF-8 at byte {expected}"


@pytest.mark.parametrize(
    ("kind", "content"),
    [("jsonl", RECORD * 50), ("json", json.dumps([json.loads(RECORD)] * 50)), ("csv", "text\n" + "some words\n" * 50)],
)
def test_a_mark_before_the_text_is_no_part_of_it(kind: str, content: str):
    Path("plain").write_text(content)
    Path("marked").write_text(f"\ufeff{content}")
    found = [build(configure(f"{{kind: {kind}, paths: [{name}]}}", f"data.dir=of-{name}"), workers=1) for name in
             ("plain", "marked")]  # fmt: skip
    assert found[0].folder.manifest.splits == found[1].folder.manifest.splits


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"text": "a"}]', "a.jsonl:1: must be a JSON object, not a list (the file begins like one list of objects: "),
        (
            '\ufeff[\n  {\n    "text": "a"}]',
            "a.jsonl:1: not JSON: Expecting value (the file begins like one list of obj",
        ),
        ('{\n  "text": "a"}', "(kind: jsonl takes one whole object a line)"),
    ],
)
def test_json_that_is_not_in_lines(content: str, expected: str):
    Path("a.jsonl").write_text(content)
    said = refused(SourceError, configure("{kind: jsonl, paths: [a.jsonl]}"))
    assert expected in said
    assert ("kind: json)" in said) == ("[" in content)


@pytest.mark.parametrize(
    ("name", "count"), [("context", 0), ("input", 15)], ids=["misspelt", "there, and empty in every fourth"]
)
def test_inputs_are_counted_and_a_name_that_no_record_has_is_told(name: str, count: int):
    records = [{"instruction": f"Add {n}", "input": "x" if n % 4 else "", "output": "ok"} for n in range(20)]
    settings = [f"data.format={{kind: instruction, input: {name}, template: '{{instruction}}{{input}}', "
                "template_without_input: '{instruction}'}"]  # fmt: skip
    built = build(configure(write_records(records), *settings, "model.context=64"), workers=1)
    lines = list(describe(built))
    assert f"fields     {name}: in {count} of 20 records" in lines
    warning = f"warning    data.format.input={name}: no record has anything there; if the records have inputs under"
    assert any(line.startswith(warning) for line in lines) == (count == 0)


@pytest.mark.parametrize(
    ("separator", "told"), [('"---"', True), ("'\\n'", True), ('"\\n"', False), ('"end"', False), ("null", False)]
)
def test_a_separator_that_stands_nowhere_is_told(separator: str, told: bool):
    for name in ("a", "b"):
        Path(f"{name}.txt").write_text("some words\n" * 50)
    with Path("b.txt").open("a") as file:
        file.write("the end")  # at the end of one file alone: still it is there
    source = f"{{kind: text, paths: [a.txt, b.txt], separator: {separator}}}"
    lines = [line for line in describe(build(configure(source), workers=1)) if line.startswith("warning")]
    assert len(lines) == told
    assert all("data.sources.0.separator=" in line and "stands in none of its files" in line for line in lines)
    assert any("a line break is" in line for line in lines) == (separator == "'\\n'")


def test_also_where_there_is_too_little_for_want_of_it():
    Path("a.txt").write_text("some words\n" * 50)
    split = "data.split={by: hash, heldout: 0.1, test: 0.0}"
    said = refused(TooLittleData, configure("{kind: text, paths: [a.txt], separator: '##'}", split))
    assert said.endswith('\nwarning    data.sources.0.separator="##": stands in none of its files; each of them is one '
                         "document")  # fmt: skip


def test_the_roles_that_stand_in_a_record_are_named():
    write_tokenizer(Path("t"))
    record = {"messages": [{"role": "user", "content": "Hi"}, {"role": "bot", "content": "Hello"}]}
    tokenizer = "data.tokenizer={kind: folder, path: t}"
    said = refused(SourceError, configure(write_records([record] * 9), "data.format.kind=chat", tokenizer))
    assert "a.jsonl:1: the assistant says nothing" in said
    assert "The roles here are: bot, user; write 'assistant' for the one" in said


def test_the_command_line_is_one_in_each_way():
    for module in ("launcher", "launcher.cli"):
        done = subprocess.run([sys.executable, "-m", module, "schema"], text=True, capture_output=True, check=True)
        assert done.stdout.startswith('{\n "$schema"'), module


def test_fewer_files_than_splits_are_said_before_anything_is_tokenised(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tasks, "tokenise", lambda _: pytest.fail("tokenised"))
    for name in ("a.txt", "b.txt"):
        Path(name).write_text("words and more words\n" * 50)
    config = configure("{kind: text, paths: [a.txt, b.txt]}", "data.split={by: hash, heldout: 0.2, test: 0.1}")
    assert "2 documents (a file is one) for 3 splits" in refused(TooLittleData, config)
    assert not Path("shards").exists()


def test_a_stage_without_any_text_has_a_pace(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """What is packed may be answers of which nothing but the end is learned."""
    with ShardProgress() as shown:
        shown.stage("pack", 0)
        later = time.monotonic() + 60
        monkeypatch.setattr(time, "monotonic", lambda: later)
        shown.advance(0)
    assert "sharding: pack 0%, 0.0 MB/s, 0.0 min left" in capsys.readouterr().err
