"""An adapter before its first step: its weights, where its base is from, and what a token costs."""

from pathlib import Path

import pytest
import torch

from llmtrain.models import base as bases
from llmtrain.models.qlora import QLoRA, lora_config
from tests.support import bases as bases_made
from tests.support.bases import SHAPE, VOCAB, configure, write_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


def build(llama: Path, *settings: str) -> QLoRA:
    return bases_made.build(configure(llama, "model.quantisation=none", *settings))


def test_initial_weights_depend_on_the_seed_alone(llama: Path):
    first, again, other = (build(llama, f"run.seed={seed}").trainable() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    begin_as_noise = [name for name in first if "lora_A" in name]
    assert begin_as_noise
    assert not any(torch.equal(first[name], other[name]) for name in begin_as_noise)


def test_an_adapter_names_its_base_and_the_revision_of_it(llama: Path):
    config = configure(llama).model
    assert config.kind == "qlora"
    described = lora_config(config.model_copy(update={"revision": "v2"}), bases.outline(config))
    assert (described.base_model_name_or_path, described.revision) == (str(llama), "v2")


def test_a_frozen_weight_costs_a_token_four_operations(llama: Path, tmp_path: Path):
    """Two in the forward pass and two in the backward one: it has no gradient of its own."""
    more_weights = VOCAB * SHAPE["hidden_size"]  # of the output layer
    larger = write_llama(tmp_path, vocab=2 * VOCAB)
    assert build(larger).flops_per_token() - build(llama).flops_per_token() == 4 * more_weights


def test_an_adapter_s_weights_are_not_counted_as_frozen_too(llama: Path):
    small, large = (build(llama, f"model.lora.r={rank}", "model.lora.alpha=16") for rank in (2, 16))
    more_weights = large.num_parameters() - small.num_parameters()
    assert large.flops_per_token() - small.flops_per_token() == 6 * more_weights
    assert large.title().partition(" M weights frozen")[0] == small.title().partition(" M weights frozen")[0]
