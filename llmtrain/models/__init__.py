"""What can be trained. `build_model` is the only place that knows the kinds."""

from llmtrain.config.schema import GPTModel
from llmtrain.models.gpt import GPT, TextGenerator

__all__ = ["GPT", "TextGenerator", "build_model"]


def build_model(config: GPTModel, vocab_size: int, seed: int, activation_checkpointing: bool = False) -> GPT:
    """The model on the CPU in fp32, with initial weights that depend on configuration and seed alone."""
    match config.kind:
        case "gpt":
            return GPT(config, vocab_size, seed, activation_checkpointing)
