"""Sources, and what a build makes of them (test_packing.py, test_tokenizers.py: of their text)."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.sharding import readers, tasks, tokenize
from launcher.sharding.build import build
from launcher.sharding.records import Found, read_documents
from launcher.sharding.show import describe
from launcher.sharding.sources import group_units, list_units
from llmtrain import recipe, shards
from llmtrain.config import RunConfig, load_config
from llmtrain.config import data_sections as schema
from llmtrain.errors import DataMismatch, EncodingError, SourceError, TooLittleData
from llmtrain.rank0 import prepare_shards
from tests.support.data import python_sources, shared


def configure(tmp_path: Path, sources: str, *more: str) -> RunConfig:
    base = ["data.tokenizer.vocab_size=300", "model.context=16", "data.split.by=tail", f"data.dir={tmp_path}/shards"]
    return load_config(None, [f"data.sources=[{sources}]", *base, *more])[0]


TEXTS = ["The first document.\nIt has two lines.", "Second: naïve café 🙂", "", "Third, " + "word " * 60]


def write_sources(folder: Path) -> dict[str, str]:
    """The same documents in each format; returns the sources as YAML."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "a.jsonl").write_text("".join(json.dumps({"id": 1, "body": t}, ensure_ascii=False) + "\n" for t in TEXTS))
    (folder / "a.csv").write_text("id,body\n" + "".join('1,"' + t.replace('"', '""') + '"\n' for t in TEXTS))
    pq.write_table(pa.table({"id": [1] * 4, "body": TEXTS}), folder / "a.parquet", row_group_size=1)
    (folder / "a.txt").write_text("<|sep|>".join(TEXTS))
    return {
        "jsonl": f"{{kind: jsonl, paths: ['{folder}/*.jsonl'], field: body}}",
        "csv": f"{{kind: csv, paths: ['{folder}/a.csv'], field: body}}",
        "parquet": f"{{kind: parquet, paths: ['{folder}/a.parquet'], field: body}}",
        "text": f"{{kind: text, paths: ['{folder}'], separator: '<|sep|>'}}",
        "huggingface": f"{{kind: huggingface, name: json, data_files: ['{folder}/a.jsonl'], field: body}}",
    }


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "text", "huggingface"])
def test_every_kind_of_source_gives_the_same_documents(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    config = configure(tmp_path, write_sources(tmp_path)[kind])
    counted = Found()
    sources = config.data.sources
    found = [
        t.text
        for unit in list_units(sources, config.data.format)
        for t in read_documents(sources[unit.source], unit, config.data.format, counted)
    ]
    assert found == [t for t in TEXTS if t]
    counted.problems.tell()
    assert counted.skipped == {"empty document": 1}


def test_a_data_set_that_has_changed_is_told_from_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    config = configure(tmp_path, write_sources(tmp_path)["huggingface"])

    def stamps() -> set[str]:
        readers._load_dataset_once.cache_clear()  # as in another process
        return {unit.stamp for unit in list_units(config.data.sources, config.data.format)}

    before = stamps()
    assert stamps() == before
    (tmp_path / "a.jsonl").write_text('{"body": "Another document."}\n')
    assert not stamps() & before


def test_a_large_jsonl_file_is_cut_between_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("launcher.sharding.sources.UNIT_BYTES", 50)
    lines = [json.dumps({"text": "x" * (i % 70)}) for i in range(1, 40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    config = configure(tmp_path, f"{{kind: jsonl, paths: ['{tmp_path}/a.jsonl']}}")
    units = list_units(config.data.sources, config.data.format)
    assert len(units) > 10
    found = [
        t.text for unit in units for t in read_documents(config.data.sources[0], unit, config.data.format, Found())
    ]
    assert found == [json.loads(line)["text"] for line in lines]


def test_small_units_are_read_together():
    config, _ = load_config(None, [])
    units = list_units(config.data.sources, config.data.format)
    grouped = group_units(units)
    assert [unit for task in grouped for unit in task] == units
    assert len(grouped) < len(units) / 20


BAD = {
    "missing": ("{kind: text, paths: [nowhere.txt, '*.nothing']}", SourceError, "nowhere.txt: no such file"),
    "empty": ("{kind: text, paths: [empty.txt]}", SourceError, "empty.txt: the file is empty"),
    "utf8": ("{kind: text, paths: [latin.txt]}", EncodingError, "latin.txt: not valid UTF-8 at byte 3"),
    "utf8 jsonl": ("{kind: jsonl, paths: [latin.jsonl]}", EncodingError, "latin.jsonl: not valid UTF-8 at byte 28"),
    "utf8 csv": ("{kind: csv, paths: [latin.csv]}", EncodingError, "latin.csv: not valid UTF-8 at byte 8"),
    "json": ("{kind: jsonl, paths: [bad.jsonl]}", SourceError, "bad.jsonl:2: not JSON"),
    "field": ("{kind: jsonl, paths: [bad.jsonl], field: txt}", SourceError, "no field 'txt'; there are: text"),
    "csv field": ("{kind: csv, paths: [ok.csv], field: nope}", SourceError, "no field 'nope'; there are: id, text"),
    "parquet": ("{kind: parquet, paths: [ok.csv]}", SourceError, "ok.csv: not a parquet file"),
    "surrogate": (
        "{kind: jsonl, paths: [half.jsonl]}",
        EncodingError,
        "half.jsonl:1: 'text' holds half a character",
    ),
    "csv comma": ("{kind: csv, paths: [comma.csv]}", SourceError, "comma.csv:2: more fields than the header has"),
    "csv quote": ("{kind: csv, paths: [quote.csv]}", SourceError, "quote.csv:2: not CSV: unexpected end of data"),
    "number": ("{kind: jsonl, paths: [number.jsonl]}", SourceError, "'text' holds a number"),
    "hub": ("{kind: huggingface, name: json, data_files: [nowhere.json]}", SourceError, "'json' cannot be loaded"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sources(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    Path("empty.txt").touch()
    Path("latin.txt").write_bytes(b"caf\xe9 au lait")
    Path("latin.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "caf\xe9"}\n')
    Path("latin.csv").write_bytes(b"text\ncaf\xe9\n")
    Path("bad.jsonl").write_text('{"text": "ok"}\n{"text": \n')
    Path("number.jsonl").write_text('{"text": 3}\n')
    Path("half.jsonl").write_text('{"text": "a\\ud83d b"}\n')
    Path("comma.csv").write_text("id,text\n1,hello, with a comma\n")
    Path("quote.csv").write_text('text\none\n"two\nthree\nfour\n')
    Path("ok.csv").write_text("id,text\n1,hello\n")
    source, kind, message = BAD[case]
    with pytest.raises(kind) as caught:
        build(configure(tmp_path, source), workers=1)
    assert message in str(caught.value)
    assert not (tmp_path / "shards" / "manifest.json").exists()


def test_all_unusable_files_are_named_at_once(tmp_path: Path):
    (tmp_path / "empty.txt").touch()
    source = f"{{kind: text, paths: ['{tmp_path}/empty.txt', '{tmp_path}/gone.txt', '{tmp_path}/*.rst']}}"
    with pytest.raises(SourceError) as caught:
        build(configure(tmp_path, source))
    assert all(name in str(caught.value) for name in ("empty.txt", "gone.txt", "*.rst"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_an_unreadable_file(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(SourceError, match=r"a\.txt: cannot be read \(Permission denied\)"):
        build(configure(tmp_path, f"{{kind: text, paths: ['{tmp_path}/a.txt']}}"))


def test_invalid_utf8_can_be_replaced_or_skipped(tmp_path: Path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 200)
    (tmp_path / "good.txt").write_text("plain words " * 100)
    for choice, skipped in (("replace", {}), ("skip", {"invalid UTF-8": 1})):
        source = f"{{kind: text, paths: ['{tmp_path}/*.txt'], invalid_utf8: {choice}}}"
        built = build(configure(tmp_path, source, f"data.dir={tmp_path}/{choice}"), workers=1)
        assert built.folder.manifest.skipped == skipped


def test_texts_of_windows_have_plain_line_ends_and_no_mark(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\r\n".encode())
    source = configure(tmp_path, f"{{kind: text, paths: ['{tmp_path}/a.txt']}}").data
    (unit,) = list_units(source.sources, source.format)
    assert [d.text for d in read_documents(source.sources[0], unit, source.format, Found())] == ["one\ntwo\n"]


def test_too_little_text_for_a_row(tmp_path: Path):
    (tmp_path / "a.txt").write_text("only a few words here, not enough for held-out rows of any length")
    with pytest.raises(
        TooLittleData, match=r"the train split has .* tokens of 1 documents: not one row of 1000 tokens"
    ):
        build(configure(tmp_path, f"{{kind: text, paths: ['{tmp_path}/a.txt']}}", "model.context=1000"), workers=1)


def test_the_lecture_text_gives_the_lectures_rows(tmp_path: Path):
    text, tokenizer = shared("the-verdict.txt"), shared("gpt2")
    config = configure(
        tmp_path,
        f"{{kind: text, paths: ['{text}']}}",
        f"data.tokenizer={{kind: folder, path: '{tokenizer}'}}",
        "data.split={by: tail, heldout: 0.1, test: 0.0}",
        "model.context=256",
    )
    built = build(config, workers=1)
    manifest = built.folder.manifest
    assert built.fast
    assert manifest.splits["train"].rows == 18
    assert sum(split.text_tokens for split in manifest.splits.values()) in range(5144, 5149)  # 5,145 uncut, and an end
    heldout = manifest.splits["heldout"]
    assert heldout.targets == heldout.text_tokens - 1


@pytest.mark.parametrize(("packing", "unpredicted"), [("contiguous", 1), ("bestfit", 0), ("none", 0)])
def test_bits_per_byte_count_what_the_tokenizer_puts_before_a_text_only_where_it_is_predicted(
    tmp_path: Path, packing: str, unpredicted: int
):
    from tokenizers import Tokenizer, processors

    tokenize.prepare(schema.DataSection(), tmp_path / "t", ["some text to train on"] * 10)
    own = Tokenizer.from_file(str(tmp_path / "t/tokenizer.json"))
    own.add_special_tokens(["<s>"])
    special = [("<s>", own.token_to_id("<s>"))]
    own.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=special)  # pyright: ignore[reportAttributeAccessIssue]
    own.save(str(tmp_path / "t/tokenizer.json"))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(100)))
    config = configure(
        tmp_path,
        f"{{kind: jsonl, paths: ['{tmp_path}/a.jsonl']}}",
        f"data.tokenizer={{kind: folder, path: '{tmp_path}/t'}}",
        "data.split={by: hash, heldout: 0.3, test: 0.0}",
        f"data.packing={packing}",
        "model.context=32",
    )
    heldout = build(config, workers=1).folder.manifest.splits["heldout"]
    assert heldout.documents > 1
    assert heldout.text_tokens - heldout.targets == unpredicted


def test_every_recipe_has_a_folder_of_its_own():
    one, two = (load_config(None, [f"data.tokenizer.vocab_size={v}"])[0] for v in (300, 400))
    assert recipe.shard_folder(one) != recipe.shard_folder(two)
    same, _ = load_config(None, ["data.tokenizer.vocab_size=300", "data.verify=size", "optim.lr=0.5"])
    assert recipe.shard_folder(one) == recipe.shard_folder(same)


def test_a_long_document_gives_a_sample_to_train_the_tokenizer_on(tmp_path: Path):
    (tmp_path / "a.txt").write_text("".join(p.read_text() for p in python_sources(12)))
    source = f"{{kind: text, paths: ['{tmp_path}/a.txt']}}"
    config = configure(tmp_path, source, "data.tokenizer={vocab_size: 500, train_bytes: 30000}")
    assert build(config, workers=1).folder.manifest.tokenizer.vocab_size == 500


def test_the_tokenizer_is_trained_on_the_training_split_alone(tmp_path: Path):
    (tmp_path / "a.txt").write_text("a plain word and another one of them " * 200 + "zq qz zzz qq " * 200)
    config = configure(tmp_path, f"{{kind: text, paths: ['{tmp_path}/a.txt']}}", "data.split.heldout=0.4")
    tokens = json.loads((build(config, workers=1).folder.tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
    assert "word" in "".join(token for token in tokens if len(token) > 2)
    assert not [token for token in tokens if token in ("zq", "qz", "zz", "qq", "Ġzq", "Ġqz", "Ġq", "Ġz")]


def test_a_build_that_died_before_its_manifest_is_finished_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = ", ".join(f'"{p}"' for p in python_sources(4))
    config = configure(tmp_path, f"{{kind: text, paths: [{source}]}}")
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "mine.arrow").write_text("not ours to delete")

    def dies(self: shards.ShardManifest) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shards.ShardManifest, "to_bytes", dies)
        with pytest.raises(KeyboardInterrupt):
            build(config, workers=1)
    assert not shards.exists(folder)
    built = build(config, workers=1)
    shards.open_folder(folder)
    assert not built.was_there
    assert (folder / "mine.arrow").exists()


def test_a_tokenizer_that_changed_since_is_noticed(tmp_path: Path):
    from transformers import AutoTokenizer

    source = ", ".join(f'"{p}"' for p in python_sources(4))
    tokenize.prepare(schema.DataSection(), tmp_path / "t", ["some text to train on"] * 10)
    (tmp_path / "t/tokenizer_config.json").unlink()
    config = configure(
        tmp_path, f"{{kind: text, paths: [{source}]}}", f"data.tokenizer={{kind: folder, path: '{tmp_path}/t'}}"
    )
    built = build(config, workers=1)
    assert AutoTokenizer.from_pretrained(built.folder.tokenizer).eos_token == "<|endoftext|>"
    file = tmp_path / "t/tokenizer.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(DataMismatch, match="built with another tokenizer"):
        build(config, workers=1)


@pytest.mark.parametrize("pattern", ["text/a.txt", "text", "te*/*.txt"])
def test_text_that_was_written_after_the_shards_is_named(
    tmp_path: Path, pattern: str, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "text").mkdir()
    file = tmp_path / "text/a.txt"
    file.write_text("".join(p.read_text() for p in python_sources(4)))
    config = configure(tmp_path, f"{{kind: text, paths: ['{tmp_path}/{pattern}']}}", "data.split.by=tail")
    assert build(config, workers=1).newer_source is None
    assert build(config, workers=1).newer_source is None
    unread = tmp_path / "text/notes.json"
    unread.write_text("{}")
    os.utime(unread, (time.time() + 100,) * 2)
    prepare_shards(config)
    assert "was written after" not in caplog.text
    later = time.time() + 100
    os.utime(file, (later, later))
    again = build(config, workers=1)
    assert again.newer_source == file
    assert f"note       {file} was written after the shards" in "\n".join(describe(again))
    prepare_shards(config)
    assert f"{file} was written after the shards" in caplog.text


@pytest.mark.parametrize("how", ["grows", "is replaced", "is gone"])
def test_a_source_that_changes_while_it_is_read_is_not_published(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Text is read to measure it, to train the tokenizer, and to tokenise it."""
    (tmp_path / "text").mkdir()
    for number, path in enumerate(python_sources(3)):
        (tmp_path / f"text/{number}.txt").write_text(path.read_text())
    file, original = tmp_path / "text/1.txt", tokenize.prepare

    def prepare_and_change(*arguments: Any) -> None:
        original(*arguments)
        if how == "is gone":
            file.rename(tmp_path / "gone")
        else:
            file.write_text(file.read_text() + "more" if how == "grows" else file.read_text().upper())

    config = configure(tmp_path, f"{{kind: text, paths: ['{tmp_path}/text']}}")
    with monkeypatch.context() as patched:
        patched.setattr(tokenize, "prepare", prepare_and_change)
        with pytest.raises(DataMismatch, match=r"a source changed while it was being read: .*1\.txt\. Nothing was"):
            build(config, workers=1)
    assert not shards.exists(tmp_path / "shards")
    assert not list((tmp_path / "shards").glob("*.arrow"))
    tasks._encoders.clear()  # the next build is another process
    built = build(config, workers=1)
    assert "starting anew" in capsys.readouterr().err
    whole = configure(tmp_path, f"{{kind: text, paths: ['{tmp_path}/text']}}", f"data.dir={tmp_path}/whole")
    assert build(whole, workers=1).folder.manifest == built.folder.manifest
