"""Adapters outside a run: which base they belong to, and loading both for generating and merging."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmtrain.config import RunConfig, load_config
from llmtrain.config.model_sections import QLoRAModel
from llmtrain.errors import CheckpointError, ConfigError

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, and how its base is to be loaded."""

    folder: Path
    base: QLoRAModel
    """With the quantisation that it was trained with, where its run is known; else with none."""
    tokenizer: str
    """Folder or name of the tokenizer."""


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def find(folder: Path) -> Adapter:
    """What an adapter's own file and, if it lies in a run, the run's configuration say.

    Raises:
        CheckpointError: the adapter's configuration cannot be read.
    """
    try:
        described = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        base, revision = described["base_model_name_or_path"], described.get("revision")
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: cannot be read as an adapter's: {error}") from error
    config = run_config(folder)
    if config is None or config.model.kind != "qlora":
        return Adapter(folder, QLoRAModel(kind="qlora", base=base, revision=revision, quantisation="none"), base)
    tokenizer = config.data.tokenizer
    named = tokenizer.path if tokenizer.kind == "folder" else base
    # Where the adapter says the base is: a relative path in the run's configuration may lead nowhere from here.
    return Adapter(folder, config.model.model_copy(update={"base": base}), named if Path(named).is_dir() else base)


def run_config(folder: Path) -> RunConfig | None:
    """The configuration of the run that RUN/checkpoints/STEP/model lies in, if it does."""
    resolved = folder.resolve()
    if len(resolved.parents) < 3 or resolved.parents[1].name != "checkpoints":
        return None
    try:
        return load_config(resolved.parents[2] / "config.yaml")[0]
    except ConfigError:
        return None


def attach(adapter: Adapter, model: Any) -> Any:
    """The base with the adapter on it (peft's model), in evaluation mode."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, str(adapter.folder)).eval()


def load_tokenizer(adapter: Adapter) -> Any:
    """transformers' tokenizer of the base (or the one that the run used).

    Raises:
        CheckpointError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(adapter.tokenizer, trust_remote_code=adapter.base.trust_remote_code)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{adapter.tokenizer}: no tokenizer can be loaded: {error}") from error


def good_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the hardware is fast at it."""
    from llmtrain.hardware import is_bf16_fast

    return torch.bfloat16 if is_bf16_fast(device) else torch.float32
