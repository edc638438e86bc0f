"""The check at the start of a run: architectures that let packed documents see each other are refused, others pass."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmtrain import assemble, shards
from llmtrain.data import Batch, make_batch
from llmtrain.errors import ModelError
from llmtrain.models import base as bases
from llmtrain.models import build_model, isolation
from llmtrain.models.qlora import QLoRA
from llmtrain.shards import Rows
from tests.support import bases as bases_made
from tests.support.bases import configure, write_llama, write_stirred

CPU = torch.device("cpu")
LEAKS: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 4, "n_head": 4},  # distances alone tell it where a token stands
    "jamba": {
        "num_hidden_layers": 8, "num_experts": 2, "mamba_d_state": 4, "use_mamba_kernels": False,
    },  # states that go on from document to document
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"]},  # convolutions
    "xglm": {"d_model": 64, "num_layers": 4, "attention_heads": 4, "ffn_dim": 128},
}  # fmt: skip
KEEPS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_neox": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "qwen3_moe": {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
}
LENGTHS = [9, 7, 21, 12]


def build(base: Path, *settings: str) -> QLoRA:
    common = ["model.quantisation=none", "model.lora.target_modules=all-linear"]
    return bases_made.build(configure(base, *common, *settings))


def packed() -> Batch:
    tokens = np.random.default_rng(0).integers(1, 512, (1, 65)).astype(np.uint16)
    return make_batch(Rows(tokens, [np.array(LENGTHS, np.int32)], None), isolate_documents=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", LEAKS)
def test_architectures_that_leak_are_refused(kind: str, precision: str, tmp_path: Path):
    model = build(write_stirred(tmp_path, kind, **LEAKS[kind]), f"train.precision={precision}")
    with pytest.raises(ModelError, match="does not keep packed documents apart"):
        isolation.check(model, packed(), LENGTHS, autocast=precision == "bf16")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KEEPS)
def test_others_do_not_move_at_all(kind: str, precision: str, tmp_path: Path):
    model = build(write_stirred(tmp_path, kind, **KEEPS[kind]), f"train.precision={precision}")
    autocast = precision == "bf16"
    assert isolation.check(model, packed(), LENGTHS, autocast) < 0.01
    assert isolation.neighbours(model, packed(), LENGTHS, autocast)[0] < 1e-6


def test_positions_that_do_not_restart_are_found(tmp_path: Path):
    """Nothing leaks then, but it is not what the base would make of the document."""
    model = build(write_stirred(tmp_path, "opt", **KEEPS["opt"]))
    plain = model.hidden
    model.hidden = lambda ids, documents, positions: plain(ids, documents, None)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ModelError, match="does not restart positions"):
        isolation.check(model, packed(), LENGTHS, autocast=False)


def test_what_another_row_does_too_is_no_leak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """int8 with large columns, not switched off: what is computed together shares them."""
    model = build(write_stirred(tmp_path, "llama"), "model.quantisation=int8")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter[:4] = 3.0
    monkeypatch.setattr(bases, "rows_apart", contextlib.nullcontext)
    moved, allowed = isolation.neighbours(model, packed(), LENGTHS, autocast=False)
    assert 1e-4 < moved <= allowed < 0.1
    isolation.check(model, packed(), LENGTHS, autocast=False)


def shard_set(folder: Path, doc_lens: list[list[int]]) -> shards.ShardSet:
    """Two shards, half of the rows in each."""
    half = len(doc_lens) // 2
    infos: list[shards.ShardInfo] = []
    for number, part in enumerate((doc_lens[:half], doc_lens[half:])):
        tokens = np.random.default_rng(number).integers(1, 512, (len(part), 65)).astype(np.uint16)
        name = f"{number}.arrow"
        shards.write_shard(folder / name, Rows(tokens, [np.array(lens, np.int32) for lens in part], None))
        infos.append(shards.ShardInfo(file=name, size_bytes=0, sha256="", rows=len(part), tokens=1, max_id=511))
    info = shards.SplitInfo(
        rows=len(doc_lens), tokens=1, targets=1, documents=1, text_bytes=1, text_tokens=1, tokens_dropped=0,
        shards=infos,
    )  # fmt: skip
    return shards.ShardSet(folder, info, context=64)


@pytest.mark.parametrize(("full", "fullest"), [(150, 150), (3, 3), (None, 0)])
def test_the_row_with_the_most_documents_is_found_wherever_it_is(tmp_path: Path, full: int | None, fullest: int):
    doc_lens = [[60]] * 199 + [[30, 30]]
    if full is None:
        doc_lens = [[60]] * 200
    else:
        doc_lens[full] = LENGTHS
    assert shard_set(tmp_path, doc_lens).fullest_row() == fullest


def test_a_leak_is_found_where_the_first_rows_hold_one_document_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """bestfit puts the longest samples first."""
    said: list[str] = []
    monkeypatch.setattr(assemble.log, "info", said.append)
    rows = shard_set(tmp_path, [[60]] * 199 + [LENGTHS])
    settings = ["model.quantisation=none", "model.lora.target_modules=all-linear"]
    leaking = configure(write_stirred(tmp_path / "bloom", "bloom", **LEAKS["bloom"]), *settings)
    with pytest.raises(ModelError, match="does not keep packed documents apart"):
        assemble.prove_isolation(leaking, build_model(leaking, 512, CPU), rows)
    kept = configure(write_llama(tmp_path / "llama"), *settings)
    model = build_model(kept, 512, CPU)
    for each in (rows, shard_set(tmp_path / "llama", [[60]] * 2)):
        assemble.prove_isolation(kept, model, each)
    assert "4 samples in a row keep apart" in said[0]
    assert "one sample a row" in said[1]
    assert len(said) == 2


def test_what_is_meant_to_be_read_as_one_is_not_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    monkeypatch.setattr(assemble.log, "info", said.append)
    config = configure(write_llama(tmp_path), "data.format.kind=text", "data.packing=contiguous")
    assemble.prove_isolation(config, build_model(config, 512, CPU), shard_set(tmp_path, [LENGTHS] * 2))
    assert "4 samples in a row read as one text" in said[0]
