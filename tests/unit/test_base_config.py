"""Bases that are counted from config.json alone: as transformers counts them."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launcher.checks import preflight
from launcher.cluster import Profile
from launcher.planning import sizes
from launcher.planning.base_config import read_facts
from launcher.slurm.batch import JobSpec
from llmtrain.config.load import Origins
from llmtrain.config.model_sections import QLoRAModel
from llmtrain.errors import ModelError
from llmtrain.models import base
from tests.support.bases import configure, write_gpt2, write_llama, write_tokenizer

SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip


def model(folder: Path, *settings: str) -> QLoRAModel:
    configured = configure(folder, *settings).model
    assert configured.kind == "qlora"
    return configured


def write(folder: Path, **values: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**SHAPE, "model_type": "llama", **values}))
    return folder


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 32},
        {"num_key_value_heads": 4},
        {"model_type": "mistral"},
        {"model_type": "mistral", "head_dim": 24},
        {"model_type": "qwen2"},
        {"model_type": "qwen2", "tie_word_embeddings": True},
        {"model_type": "qwen3", "head_dim": 32},
        {"model_type": "qwen3", "head_dim": 16, "attention_bias": True},
    ],
    ids=lambda values: " ".join(f"{key}={value}" for key, value in values.items()) or "plain",
)
def test_they_are_counted_as_transformers_counts_them(tmp_path: Path, values: dict[str, Any]):
    configured = model(write(tmp_path, **values))
    facts = read_facts(configured, None)
    assert facts is not None
    assert facts == base.describe(configured)


def test_a_base_as_transformers_saves_it(tmp_path: Path):
    configured = model(write_llama(tmp_path))
    assert read_facts(configured, None) == base.describe(configured)


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "gemma2"},
        {"model_type": "qwen3"},  # its head_dim has a default of its own
        {"tie_word_embeddings": None},
        {"num_key_value_heads": None},
        {"quantization_config": {"quant_method": "gptq"}},
        {"auto_map": {"AutoConfig": "x.Y"}},
        {"max_position_embeddings": 32},  # too short for the configured context: transformers' process says so
    ],
    ids=str,
)
def test_what_is_unusual_is_left_to_transformers(tmp_path: Path, values: dict[str, Any]):
    assert read_facts(model(write(tmp_path, **values)), None) is None


def test_unknown_targets_and_other_architectures_are_left_to_transformers(tmp_path: Path):
    configured = model(write(tmp_path), "model.lora.target_modules=[q_proj, w_proj]")
    assert read_facts(configured, None) is None
    other = tmp_path / "gpt2"
    other.mkdir()
    assert read_facts(model(write_gpt2(other)), None) is None
    (tmp_path / "config.json").write_text("{")
    assert read_facts(model(tmp_path), None) is None


def test_it_is_found_where_the_hubs_client_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    configured = model(Path("ada/llama"))
    assert read_facts(configured, None) is None
    kept = tmp_path / "hub/models--ada--llama"
    commit = "c0ffee" + "0" * 34
    (kept / "snapshots" / commit).mkdir(parents=True)
    write(kept / "snapshots" / commit)
    (kept / "refs").mkdir()
    (kept / "refs/main").write_text(commit)
    found = read_facts(configured, None)
    assert found is not None
    assert found.hidden == 64
    assert read_facts(model(Path("ada/llama"), f"model.revision={commit}"), None) == found
    assert read_facts(model(Path("ada/llama"), "model.revision=other"), None) is None
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    assert read_facts(model(Path("ada/unknown")), str(write(folder))) == found


def test_what_to_do_about_a_base_out_of_reach_is_not_said_of_one_that_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuses(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 21, "", "error: no\n")

    monkeypatch.setattr(sizes.subprocess, "run", refuses)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    said = "what nobody/nothing is made of is not known; where it cannot be reached, give --base-config FOLDER"
    for config, told in (
        (configure(write(tmp_path, model_type="opt")), "no"),
        (configure(tmp_path, "model.base=nobody/nothing"), f"no\n{said} with its config.json"),
    ):
        with pytest.raises(sizes.UnknownBase) as caught:
            sizes.find_sizes(config, None, None, None)
        assert (str(caught.value), caught.value.exit_code) == (told, 21)


def test_a_tokenizer_that_the_base_cannot_read_is_refused_before_there_are_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    settings = ["data.tokenizer.vocab_size=600", "run.dir=runs"]
    config = configure(write(tmp_path), *settings)
    message = "model.base=.*\n  - the tokenizer has 600 tokens, but the base's embedding only 512 rows"
    with pytest.raises(ModelError, match=message):
        sizes.find_sizes(config, None, None, None)
    job = JobSpec("run", tmp_path, Profile(name="here", gpus_per_node=1))
    found = [each for each in preflight.check_run(config, Origins({}), job) if each.what == "base"]
    assert [each.severity for each in found] == ["error"]
    assert re.match(message, found[0].message)
    write_tokenizer(tmp_path / "larger", 600)
    with pytest.raises(ModelError, match="has 600 tokens"):
        sizes.find_sizes(configure(tmp_path, f"data.tokenizer.path={tmp_path / 'larger'}"), None, None, None)
    sizes.find_sizes(configure(tmp_path, "data.tokenizer.vocab_size=512"), None, None, None)
