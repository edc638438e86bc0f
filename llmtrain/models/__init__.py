"""What can be trained. `build_model` is the only place that knows the kinds, `Trainable` what each of them offers."""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from llmtrain.config.model_sections import GPTModel, QLoRAModel
from llmtrain.config.schema import RunConfig
from llmtrain.data import Documents
from llmtrain.manifest import FileInfo
from llmtrain.models.attention import has_flash
from llmtrain.models.cached import CachedGenerator
from llmtrain.models.gpt import GPT

if TYPE_CHECKING:  # peft and bitsandbytes take seconds to import
    from llmtrain.models.qlora import QLoRA

__all__ = ["GPT", "Trainable", "build_model"]


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
    config: RunConfig, vocab_size: int, device: torch.device, is_loaded_next: bool = False
) -> "GPT | QLoRA":
    """The model with initial weights that depend on configuration and seed alone.

    `is_loaded_next`: a GPT's weights are not drawn, because `load` follows.
    A GPT is in fp32 on the CPU; a base with LoRA on `device`, where its quantisation happens.
    """
    recompute = config.train.activation_checkpointing
    match config.model:
        case GPTModel():
            flash = has_flash(device, config.model.width // config.model.num_heads)
            return GPT(config.model, vocab_size, None if is_loaded_next else config.run.seed, recompute, flash)
        case QLoRAModel():
            from llmtrain.models.qlora import QLoRA

            return QLoRA(config.model, config.train.precision, device, config.run.seed, recompute)
