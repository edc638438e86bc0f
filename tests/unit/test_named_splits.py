"""Sources that go into one split as a whole: held-out and test files of one's own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.sharding import show
from launcher.sharding.build import build
from llmtrain import recipe, shards
from llmtrain.config import RunConfig, load_config
from llmtrain.errors import ConfigError, TooLittleData
from llmtrain.rundir import RunDir
from llmtrain.service import card

WORDS = {"train": "apple pear plum ", "heldout": "seven eight nine ", "test": "red green blue "}


@pytest.fixture(autouse=True)
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, words in WORDS.items():
        Path(f"{name}.txt").write_text(words * 60)
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"text": words * 4}) + "\n" for _ in range(15)))


def configure(sources: str, *settings: str) -> RunConfig:
    given = [f"data.sources=[{sources}]", "data.tokenizer.vocab_size=300", "model.context=16"]
    return load_config(None, [*given, *settings])[0]


def text(name: str, use: str | None = None) -> str:
    return f"{{kind: text, paths: [{name}.txt]{f', use: {use}' if use else ''}}}"


def jsonl(name: str, use: str | None = None) -> str:
    return f"{{kind: jsonl, paths: [{name}.jsonl]{f', use: {use}' if use else ''}}}"


def words_of(folder: shards.ShardFolder) -> dict[str, set[str]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder.tokenizer / "tokenizer.json"))
    return {
        name: {w for d in show.documents(folder, name, 1000) for w in tokenizer.decode(d.ids.tolist()).split()}
        for name in folder.manifest.splits
    }


@pytest.mark.parametrize("by", ["hash", "tail"])
@pytest.mark.parametrize("kind", [text, jsonl])
def test_two_files_are_exactly_the_two_splits(by: str, kind: Callable[..., str]):
    built = build(
        configure(f"{kind('heldout', 'heldout')}, {kind('train', 'train')}", f"data.split.by={by}"), workers=1
    ).folder
    splits = built.manifest.splits
    assert set(splits) == {"train", "heldout"}
    assert {name: split.text_bytes for name, split in splits.items()} == {n: len(WORDS[n]) * 60 for n in splits}
    assert splits["train"].documents == (1 if kind is text else 15)
    found = words_of(built)
    assert found["heldout"] & set(WORDS["heldout"].split())
    assert not found["train"] & set(WORDS["heldout"].split())
    assert not found["heldout"] & set(WORDS["train"].split())


@pytest.mark.parametrize("by", ["hash", "tail"])
def test_the_other_sources_give_nothing_to_a_split_that_has_its_own(by: str):
    sources = f"{jsonl('test', 'test')}, {jsonl('train')}, {jsonl('heldout', 'heldout')}"
    splits = build(configure(sources, f"data.split={{by: {by}, heldout: 0.5, test: 0.4}}"), workers=1).folder.manifest
    assert {name: split.documents for name, split in splits.splits.items()} == dict.fromkeys(WORDS, 15)


def test_the_rest_is_split_as_if_it_were_alone():
    """Under tail a named source counts for nothing in the length of the text, wherever it stands."""
    sources = f"{text('heldout', 'heldout')}, {text('train')}"
    splits = build(configure(sources, "data.split={by: tail, test: 0.25}"), workers=1).folder.manifest.splits
    whole = len(WORDS["train"]) * 60
    assert {name: split.text_bytes for name, split in splits.items()} == {
        "train": whole * 3 // 4, "heldout": len(WORDS["heldout"]) * 60, "test": whole // 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (f"{text('train', 'train')}", "every source has a `use`, and none is for held-out text"),
        (f"{text('heldout', 'heldout')}", "no source is left to train on"),
        (f"{text('heldout', 'val')}", 'use="val" (command line): use one of'),
    ],
)
def test_what_leaves_a_split_empty_is_said_before_anything_is_read(sources: str, expected: str):
    with pytest.raises(ConfigError) as caught:
        configure(sources)
    assert expected in str(caught.value)


def test_too_little_names_the_source():
    Path("heldout.txt").write_text("x")
    with pytest.raises(TooLittleData, match=r"1 document \(a file is one\) for 2 splits: .* or use: train for it"):
        build(configure(f"{text('train')}, {text('heldout', 'heldout')}"), workers=1)
    with pytest.raises(TooLittleData, match=r"the train split .* Use more text in the source with use: train, or a sh"):
        build(configure(f"{text('heldout', 'train')}, {text('train', 'heldout')}"), workers=1)


def test_shards_without_it_keep_their_names():
    kept: dict[str, Any] = recipe.recipe_of(configure(jsonl("train")))
    assert kept["sources"] == [{"kind": "jsonl", "paths": ["train.jsonl"], "field": "text"}]
    assert (
        recipe.recipe_of(configure(f"{jsonl('train')}, {jsonl('test', 'heldout')}"))["sources"][1]["use"] == "heldout"
    )


def test_what_is_said_of_the_splits(tmp_path: Path):
    run = RunDir(tmp_path / "run")
    config = configure(f"{text('train', 'train')}, {text('heldout', 'heldout')}")
    assert "Held-out data (of sources of their own) chose" in card._data(run, config)
    assert "there is no test data" in card._data(run, config)
    config = configure(f"{text('train')}, {text('test', 'test')}")
    assert "Held-out data (2%, by hash) chose" in card._data(run, config)
    assert "test data (of sources of their own) was not used" in card._data(run, config)
