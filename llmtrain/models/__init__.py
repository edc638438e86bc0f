"""What can be trained. `build_model` is the only place that knows the kinds, `Trainable` what each of them offers."""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from llmtrain import model_files
from llmtrain.config.model_sections import GPTModel, LlamaModel, QLoRAModel
from llmtrain.config.schema import RunConfig
from llmtrain.data import Documents
from llmtrain.errors import CheckpointError, disk_errors
from llmtrain.manifest import FileInfo
from llmtrain.models.attention import has_flash
from llmtrain.models.cached import CachedGenerator
from llmtrain.models.gpt import GPT
from llmtrain.models.llama import Llama

if TYPE_CHECKING:  # peft and bitsandbytes take seconds to import
    from llmtrain.models.qlora import QLoRA

__all__ = ["GPT", "FromScratch", "Llama", "Trainable", "build_model", "read_model"]

FromScratch = GPT | Llama


class Trainable(Protocol):
    """A summed loss, and a file format of its own. Arguments of the loss as in `data.Batch`."""

    def __call__(
        self,
        input_ids: Tensor,
        targets: Tensor,
        documents: Documents | None,
        positions: Tensor | None,
        learned: Tensor | None,
    ) -> Tensor: ...
    def save(self, folder: Path, weights: dict[str, Tensor], eos_id: int) -> dict[str, FileInfo]: ...
    def load(self, folder: Path) -> None: ...
    def text_generator(self) -> CachedGenerator: ...
    def title(self) -> str: ...
    def flops_per_token(self) -> float: ...


def build_model(
    config: RunConfig, tokens: int, device: torch.device, is_loaded_next: bool = False
) -> "FromScratch | QLoRA":
    """The model with initial weights that depend on configuration and seed alone.

    `tokens`: of the tokenizer. `is_loaded_next`: weights are not drawn, because `load` follows.
    What is trained from scratch is in fp32 on the CPU; a base with LoRA on `device`, where its quantisation happens.
    """
    model, recompute = config.model, config.train.activation_checkpointing
    seed = None if is_loaded_next else config.run.seed
    match model:
        case GPTModel():
            flash = has_flash(device, model.head_channels)
            return GPT(model, model.rows(tokens), seed, recompute, flash)
        case LlamaModel():
            flash = has_flash(device, model.head_channels)
            return Llama(model, model.rows(tokens), seed, recompute, flash)
        case QLoRAModel():
            from llmtrain.models.qlora import QLoRA

            return QLoRA(model, config.train.precision, device, config.run.seed, recompute)


def read_model(folder: Path) -> tuple[FromScratch, int]:
    """The model that a GPT's or a Llama's `save` wrote, on the CPU, and its end-of-text id.

    Raises:
        CheckpointError: the folder is not readable as one.
    """
    found = model_files.read(folder)
    if found.eos_id is None:
        raise CheckpointError(f"{folder}: its config.json does not say which token ends a text")
    match found.model:
        case GPTModel():
            model = GPT(found.model, found.vocab_size, seed=None)
        case LlamaModel():
            model = Llama(found.model, found.vocab_size, seed=None)
    with disk_errors("model", folder, then="it is read"):
        model.load(folder)
    return model, found.eos_id
