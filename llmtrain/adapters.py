"""Adapters outside a run: which base and tokenizer they belong to, and loading these for generating and merging."""

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmtrain import files, prompts, trained, transformers_ids
from llmtrain.base_facts import is_path
from llmtrain.config.model_sections import QLoRAModel
from llmtrain.errors import CheckpointError
from llmtrain.trained import Training

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class TokenizerPlace:
    """The tokenizer that an adapter was trained with."""

    name: str
    """A folder, or a name on the Hub."""
    revision: str | None = None
    eos_id: int | None = None
    """What ended the texts, where `name` is the run's own copy; else the tokenizer itself says it."""


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, and how its base is to be loaded."""

    folder: Path
    base: QLoRAModel
    """With the quantisation that it was trained with, where its run is known; else with none."""
    tokenizer: TokenizerPlace


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def find(folder: Path, trust_remote_code: bool) -> Adapter:
    """What an adapter's own file and the configuration of its run, if that is known, say.

    Args:
        trust_remote_code: a base may run code of its own. What the run's configuration says of that counts in the
            run's own folder alone: a file that was downloaded with an adapter may not allow it.

    Raises:
        CheckpointError: the adapter's configuration cannot be read, or its base or the tokenizer of its run is gone.
    """
    try:
        described = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        base, revision = files.expand_home(described["base_model_name_or_path"]), described.get("revision")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: cannot be read as an adapter's: {error}") from error
    if is_path(base) and not Path(base).is_dir():
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: the adapter's base is {base}, and no such folder is here (any more). Bring it "
            "back, or write into base_model_name_or_path where it is now"
        )
    training = trained.find(folder)
    if training is None or training.config.model.kind != "qlora":
        model = QLoRAModel(
            kind="qlora", base=base, revision=revision, quantisation="none", trust_remote_code=trust_remote_code
        )
        return Adapter(folder, model, TokenizerPlace(base, revision))
    # Where the adapter says the base is: a relative path in the run's configuration may lead nowhere from here.
    trust = trust_remote_code or (training.in_its_run and training.config.model.trust_remote_code)
    model = training.config.model.model_copy(update={"base": base, "trust_remote_code": trust})
    return Adapter(folder, model, find_tokenizer(training, training.config.model.base, base))


def find_tokenizer(training: Training, base: str, base_here: str) -> TokenizerPlace:
    """The copy in the run's shards; without them, what the configuration names.

    Args:
        base, base_here: the base in the run's configuration, and where it is.

    Raises:
        CheckpointError: it is nowhere.
    """
    data = trained.shards_of(training)
    if data is not None:
        return TokenizerPlace(str(data.tokenizer), eos_id=data.manifest.tokenizer.eos_id)
    lost = f"{trained.shard_folder(training)}: the data of this adapter's run is not there (any more)"
    chosen = training.config.data.tokenizer
    match chosen.kind:
        case "train":
            raise CheckpointError(f"{lost}, and with it the tokenizer that was trained on it")
        case "hub":
            return TokenizerPlace(base_here if chosen.name == base else chosen.name, chosen.revision)
        case "folder":
            named = base_here if chosen.path == base else chosen.path
            path = training.start / named
            if not path.is_dir():
                raise CheckpointError(
                    f"data.tokenizer.path={named} ({training.file}): no such folder ({path}). {lost}, so the tokenizer "
                    "that the adapter was trained with cannot be had; bring back one of them"
                )
            return TokenizerPlace(str(path))


def attach(adapter: Adapter, model: Any) -> Any:
    """The base with the adapter on it (peft's model), in evaluation mode."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, str(adapter.folder)).eval()


def write_tokenizer(adapter: Adapter, to: Path) -> int:
    """Write the tokenizer's files into a folder, with the chat template beside the adapter; returns the id that ends
    a text.

    Raises:
        CheckpointError: it cannot be loaded, or ends no text.
    """
    place = adapter.tokenizer
    eos_id = place.eos_id
    if eos_id is None:
        eos_id = _save_loaded(place, to, adapter.base.trust_remote_code)
    else:
        for file in prompts.files_of(Path(place.name)):
            shutil.copyfile(file, to / file.name)
    copy = adapter.folder / prompts.TEMPLATE
    template = copy.read_text(encoding="utf-8") if copy.is_file() else None
    prompts.write_settings(to, eos_id, template)
    return eos_id


def _save_loaded(place: TokenizerPlace, to: Path, trust_remote_code: bool) -> int:
    try:
        tokenizer = transformers_ids.download(place.name, place.revision, to, trust_remote_code)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{place.name}: no tokenizer can be loaded: {error}") from error
    if not (to / "tokenizer.json").is_file() or tokenizer.eos_token_id is None:
        raise CheckpointError(f"{place.name}: a tokenizer without tokenizer.json or without an end-of-text token")
    return tokenizer.eos_token_id


def good_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the hardware is fast at it."""
    from llmtrain.hardware import is_bf16_fast

    return torch.bfloat16 if is_bf16_fast(device) else torch.float32
