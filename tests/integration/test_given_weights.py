"""`model.start_from`: a run that begins with the weights of another, or of transformers'."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmtrain import shards
from llmtrain.errors import ConfigError
from tests.support.runs import GPT, LLAMA, Workplace, make_workplace

SETTINGS = ["train.steps=8", "checkpoint.every_steps=4", "evaluate.train_rows=0"]

ONE_KIND = pytest.mark.parametrize("trained", [GPT], ids=["gpt"], indirect=True)
"""What is refused before a model is built."""


@pytest.fixture(scope="module", params=[GPT, LLAMA], ids=["gpt", "llama"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    workplace = make_workplace(tmp_path_factory.mktemp("given"), model=request.param)
    workplace.train("run.name=first", *SETTINGS)
    return workplace


def start_of(workplace: Workplace) -> str:
    return f"model.start_from={workplace.run_folder('first')}/checkpoints/step-00000008/model"


@pytest.mark.parametrize(("ranks", "own"), [(1, []), (2, ["strategy.kind=zero2"])])
def test_it_begins_where_the_other_ended(trained: Workplace, ranks: int, own: list[str]):
    name = f"second{ranks}"
    said = trained.train(f"run.name={name}", start_of(trained), *own, *SETTINGS, ranks=ranks)
    ended = trained.ledger("first", "heldout")[-1]["loss"]
    first, *_, last = (record["loss"] for record in trained.ledger(name, "heldout"))
    assert first == pytest.approx(ended, abs=1e-6)
    assert last < first
    assert "with the weights" in (trained.run_folder(name) / "events.jsonl").read_text()
    assert "weights    those of" in said


def test_it_resumes_when_that_folder_is_gone(trained: Workplace, tmp_path: Path):
    copied = shutil.copytree(start_of(trained).partition("=")[2], tmp_path / "copied")
    tokenizer = f"data.tokenizer={{kind: folder, path: {copied}}}"
    start = [f"model.start_from={copied}", tokenizer, f"data.dir={tmp_path / 'shards'}", *SETTINGS]
    start += ["run.name=gone", "optim.schedule.kind=constant"]
    trained.train(*start, "train.steps=4")
    shutil.rmtree(copied)
    assert "resuming   from step 4" in trained.train(*start)


def refused(workplace: Workplace, *settings: str) -> str:
    said = workplace.train("run.name=refused", *settings, *SETTINGS, code=ConfigError.exit_code)
    assert not workplace.run_folder("refused").exists()
    return said


@ONE_KIND
def test_what_does_not_fit_is_told_before_anything_is_built(trained: Workplace, tmp_path: Path):
    fresh = f"data.dir={tmp_path / 'shards'}"
    said = refused(trained, start_of(trained), "model.width=64", "model.num_layers=3", fresh)
    assert "it has num_layers=2, here 3; set model.num_layers=2" in said
    assert "it has width=32, here 64; set model.width=32" in said
    assert not (tmp_path / "shards").exists()
    folder = Path(start_of(trained).partition("=")[2])
    assert f"give {folder}" in refused(trained, f"model.start_from={folder.parent}", fresh)
    run = trained.run_folder("first")
    assert f"'llmtrain checkpoints {run}' names" in refused(trained, f"model.start_from={run}", fresh)
    weights = folder / "model.safetensors"
    weights.rename(folder / "aside")
    try:
        assert "from_pretrained(OLD).save_pretrained(NEW)" in refused(trained, start_of(trained), fresh)
    finally:
        (folder / "aside").rename(weights)


@ONE_KIND
def test_of_weights_in_several_files_all_have_to_be_there(trained: Workplace, tmp_path: Path):
    folder = shutil.copytree(start_of(trained).partition("=")[2], tmp_path / "folder")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    start = [f"model.start_from={folder}", f"data.dir={tmp_path / 'shards'}"]
    index = folder / "model.safetensors.index.json"
    index.write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    )
    assert "no model-00002-of-00002.safetensors there" in refused(trained, *start)
    index.write_text('{"weight_map": {"a": "../model-00001-of-00002.safetensors"}}')
    assert "it has to name files beside it" in refused(trained, *start)


@ONE_KIND
def test_another_tokenizer_of_the_same_size_is_refused(trained: Workplace, tmp_path: Path):
    """512 tokens too, learned from other text: every row of the embedding would mean something else."""
    other = ["data.tokenizer={kind: train, vocab_size: 512}", f"data.dir={tmp_path / 'shards'}"]
    other += ["data.sources=[{kind: text, paths: ['" + str(Path(__file__).parents[2] / "docs" / "*.md") + "']}]"]
    assert "its tokenizer has other tokens than the data's" in refused(trained, start_of(trained), *other)


@pytest.mark.parametrize(("kind", "rows"), [("gpt2", 512), ("llama", 512), ("qwen3", 576)])
def test_models_of_transformers_are_begun_with(kind: str, rows: int, tmp_path: Path):
    """Settings as the messages propose them; Qwen's embeddings have more rows than there are tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32,
        "intermediate_size": 96, "max_position_embeddings": 128,
    }  # fmt: skip
    sizes: dict[str, dict[str, Any]] = {
        "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64},
        "qwen3": {**common, "head_dim": 16, "tie_word_embeddings": True},
        "llama": {
            **common, "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 32.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
            },
        },
    }  # fmt: skip
    work = make_workplace(tmp_path)
    work.train("run.name=tokens", "train.steps=1", *SETTINGS[1:])
    heldout = shards.open_folder(work.folder / "shards").split("heldout")
    texts = heldout.rows(np.arange(heldout.num_rows))
    made = tmp_path / "made"
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=rows, **sizes[kind]))
    theirs.save_pretrained(made, max_shard_size="40KB")
    assert len(list(made.glob("*.safetensors"))) > 1
    for file in (work.folder / "shards" / "tokenizer").iterdir():
        shutil.copy(file, made)
    own = [f"model.start_from={made}", "data.tokenizer={kind: folder, path: made}", "data.dir=others"]
    if kind != "gpt2":
        said = refused(work, *own)
        assert f"it is a {kind.title()}; set model.kind=llama" in said
        proposed = said.partition("all of it: model: ")[2].partition("\n")[0]
        own[0] = f"model={proposed.removesuffix('}')}, context: 64}}"
    if rows > 512:
        assert f"set model.vocab_size={rows}" in refused(work, *own)
        own.append(f"model.vocab_size={rows}")
    said = work.train("run.name=begun", *own, *SETTINGS)
    total, learned = 0.0, 0
    for tokens, doc_lens in zip(texts.tokens, texts.doc_lens, strict=True):
        length = int(doc_lens.sum())  # the last row is not full
        ids = torch.from_numpy(tokens[:length].astype(np.int64))[None]
        with torch.no_grad():
            logits = theirs.eval()(ids[:, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        learned += length - 1
    assert work.ledger("begun", "heldout")[0]["loss"] == pytest.approx(total / learned, abs=1e-5)
    newest = tmp_path / "runs" / "begun" / "checkpoints" / "step-00000008" / "model"
    assert type(AutoModelForCausalLM.from_pretrained(newest)) is type(theirs)
    assert "8 steps" in said
