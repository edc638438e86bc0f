"""Shard folders: what is wrong with one is found before training."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from launcher.sharding.build import build
from llmtrain import files, recipe, shards
from llmtrain.config import load_config
from llmtrain.errors import DataMismatch, ShardError, UserError, VocabularyError
from llmtrain.shards import Rows
from tests.support.data import python_sources

SETTINGS = ["data.tokenizer.vocab_size=300", "model.context=32", "data.split.by=tail"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config, _ = load_config(None, [*SETTINGS, f"data.dir={tmp_path}/s", source_setting(2)])
    return build(config, workers=1).folder.path


def source_setting(count: int) -> str:
    paths = ", ".join(f'"{p}"' for p in python_sources(count))
    return f"data.sources=[{{kind: text, paths: [{paths}]}}]"


def test_rows_are_read_back_and_readable_with_datasets(folder: Path):
    from datasets import Dataset

    train = shards.open_folder(folder).split("train")
    theirs = Dataset.from_file(str(folder / "train-00000.arrow"))
    assert len(theirs) == train.num_rows
    rows = train.rows(np.array([3, 1]))
    assert rows.tokens.dtype == np.uint16
    assert rows.tokens.tolist() == [theirs[3]["input_ids"], theirs[1]["input_ids"]]
    assert [lens.tolist() for lens in rows.doc_lens] == [theirs[3]["doc_lens"], theirs[1]["doc_lens"]]


def test_a_supervision_mask_is_stored_beside_the_tokens(tmp_path: Path):
    tokens = np.arange(12, dtype=np.uint32).reshape(2, 6)
    mask = np.array([[0, 0, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0]], np.uint8)
    shards.write_shard(tmp_path / "a.arrow", Rows(tokens, [np.array([6], np.int32), np.array([2, 3], np.int32)], mask))
    info = shards.ShardInfo(file="a.arrow", size_bytes=0, sha256="", rows=2, tokens=11, max_id=11)
    split = shards.SplitInfo(
        rows=2, tokens=11, targets=8, documents=3, text_bytes=1, text_tokens=1, tokens_dropped=0, shards=[info]
    )
    read = shards.ShardSet(tmp_path, split, context=5).rows(np.array([1, 0]))
    assert read.loss_mask is not None
    assert read.loss_mask.tolist() == mask[::-1].tolist()
    assert read.tokens.dtype == np.uint32


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize(
    "name", ["train-00000.arrow", "heldout-00000.arrow", "test-00000.arrow", "tokenizer/tokenizer.json"]
)
def test_damage_is_found_and_the_file_named(folder: Path, name: str, damage: Callable[[Path], None]):
    damage(folder / name)
    with pytest.raises(UserError, match=name) as caught:
        shards.open_folder(folder)
    assert caught.value.exit_code in (ShardError.exit_code, DataMismatch.exit_code)
    assert "shard CONFIG --force" in str(caught.value)


def test_without_hashing_sizes_are_still_checked(folder: Path):
    flip(folder / "train-00000.arrow")
    shards.open_folder(folder, "size")
    truncate(folder / "train-00000.arrow")
    with pytest.raises(ShardError, match="truncated or altered"):
        shards.open_folder(folder, "size")


def test_a_manifest_that_is_not_one(folder: Path):
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(ShardError, match="not a manifest of this version"):
        shards.open_folder(folder)


def test_an_id_beyond_the_vocabulary_is_found_even_if_the_manifest_hides_it(folder: Path):
    """As a foreign tool would leave it: the hashes are right, the content is not."""
    path = folder / "train-00000.arrow"
    opened = shards.open_folder(folder)
    rows = opened.split("train").rows(np.arange(opened.split("train").num_rows))
    rows.tokens[5, 7] = 300
    shards.write_shard(path, rows)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0].update(size_bytes=path.stat().st_size, sha256=files.sha256(path))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(VocabularyError, match=r"token id 300, but the tokenizer has only 300 tokens"):
        shards.open_folder(folder)


def test_another_recipe_is_refused_and_says_what_differs(folder: Path):
    config, _ = load_config(None, [*SETTINGS, source_setting(2), "data.tokenizer.vocab_size=400", f"data.dir={folder}"])
    with pytest.raises(DataMismatch, match=r"tokenizer: shards have .*300.*, the configuration .*400"):
        recipe.open_shards(config, "sha256")


def test_the_fingerprint_is_the_manifests_hash(folder: Path):
    assert shards.open_folder(folder).fingerprint == files.sha256(folder / "manifest.json")


def test_reading_a_shard_copies_nothing(folder: Path):
    before = pa.total_allocated_bytes()
    shards.open_folder(folder, "size").split("train")
    assert pa.total_allocated_bytes() - before < 10_000
