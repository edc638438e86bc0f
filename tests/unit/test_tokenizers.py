"""Training and loading tokenizers; the fast encoder and the proof that its ids are the same."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from launcher.sharding import tokenize
from llmtrain.config import data_sections as schema
from llmtrain.errors import TokenizerError
from tests.support.data import python_sources, shared


def test_a_trained_tokenizer_loads_with_transformers(tmp_path: Path):
    from transformers import AutoTokenizer

    tokenize.prepare(schema.DataSection(), tmp_path, [p.read_text() for p in python_sources(3)])
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token == "<|endoftext|>"
    text = "def f(x):\n    return 'é🙂'"
    ours = tokenize.Encoder(tmp_path, fast=True)
    assert ours.is_fast
    assert ours.encode(text).tolist() == theirs(text)["input_ids"]
    assert theirs.decode(ours.encode(text)) == text


@given(text=st.text(max_size=200))
@settings(max_examples=300, deadline=None)
def test_tiktoken_gives_the_ids_of_tokenizers(gpt2_encoders, text: str):
    fast, slow = gpt2_encoders
    assert fast.encode(text).tolist() == slow.encode(text).tolist()


@pytest.fixture(scope="module")
def gpt2_encoders():
    folder = shared("gpt2")
    assert tokenize.same_ids(folder, [])
    return tokenize.Encoder(folder, fast=True), tokenize.Encoder(folder, fast=False)


def test_special_token_text_in_a_document_stays_text(gpt2_encoders):
    fast, slow = gpt2_encoders
    text = "before<|endoftext|>after"
    assert fast.eos_id not in fast.encode(text)
    assert slow.eos_id not in slow.encode(text)


def test_a_tokenizer_of_another_shape_stays_on_tokenizers(tmp_path: Path):
    tokenize.prepare(schema.DataSection(), tmp_path, ["some text to train on"])
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    added = {**spec["added_tokens"][0], "id": 9999, "content": "RARE", "special": False}
    for change in ({"normalizer": {"type": "NFC"}}, {"added_tokens": [*spec["added_tokens"], added]}):
        (tmp_path / "tokenizer.json").write_text(json.dumps({**spec, **change}))
        assert not tokenize.Encoder(tmp_path, fast=True).is_fast
        assert not tokenize.same_ids(tmp_path, [])


def test_different_ids_are_found_by_the_proof(tmp_path: Path):
    """A split regex that looks the same from outside: digits one by one."""
    tokenize.prepare(schema.DataSection(), tmp_path, ["12 34 567 1234567 12345"] * 50)
    original = tokenize._GPT2_SPLIT
    try:
        tokenize._GPT2_SPLIT = original.replace(r" ?\p{N}++", r"\p{N}")
        assert not tokenize.same_ids(tmp_path, ["1234567"])
    finally:
        tokenize._GPT2_SPLIT = original
    assert tokenize.same_ids(tmp_path, ["1234567"])


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    Tokenizer(models.BPE({"a": 0}, [])).save(str(source / "tokenizer.json"))
    config = schema.DataSection(tokenizer=schema.FolderTokenizer(kind="folder", path=str(source)))
    with pytest.raises(TokenizerError, match="no end-of-text token; set eos_token"):
        tokenize.prepare(config, tmp_path / "out", [])
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="not a tokenizer"):
        tokenize.prepare(config, tmp_path / "out", [])


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_settings_that_are_none_are_refused(tmp_path: Path, content: str):
    tokenize.prepare(schema.DataSection(), tmp_path / "own", ["some text to train on"])
    (tmp_path / "own/tokenizer_config.json").write_text(content, encoding="latin1")
    chosen = schema.DataSection(tokenizer=schema.FolderTokenizer(kind="folder", path=str(tmp_path / "own")))
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: (not JSON|must be a JSON object)"):
        tokenize.prepare(chosen, tmp_path / "copy", [])


def test_no_text_is_cut_or_filled_up_whatever_the_tokenizer_says(tmp_path: Path):
    """Many on the Hub were saved with the lengths of somebody's training."""
    tokenize.prepare(schema.DataSection(), tmp_path, ["some text to train on"])
    file = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    whole = tokenizer.encode("one two three").ids
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(file))
    encoder = tokenize.Encoder(tmp_path, fast=False)
    assert encoder.encode("one two three").tolist() == whole
    assert encoder.encode_special("one two three").tolist() == whole


def test_a_vocabulary_with_gaps_reaches_to_its_highest_id(tmp_path: Path):
    tokenize.prepare(schema.DataSection(), tmp_path, ["some text to train on"])
    file = tmp_path / "tokenizer.json"
    spec = json.loads(file.read_text())
    vocab: dict[str, int] = spec["model"]["vocab"]
    vocab[max(vocab, key=lambda token: vocab[token])] = 600
    file.write_text(json.dumps(spec))
    assert tokenize.Encoder(tmp_path, fast=False).vocab_size == 601
