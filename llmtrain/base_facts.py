"""What a base model is made of: numbers that planning needs, without torch. `models/base.py` counts them."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from llmtrain import log
from llmtrain.config.load import Origins
from llmtrain.config.schema import RunConfig
from llmtrain.errors import ModelError

OTHER_FORMATS = ("consolidated*", "original/*")
"""Files that hold a base's weights a second time, in its makers' own format: transformers does not read them."""


def check_place(config: RunConfig, origins: Origins) -> None:
    """Say at once, before the Hub is asked for it again and again, that a base without "/" in its name is no folder.

    Raises:
        ModelError: the base can only be a folder, and is none.
    """
    if config.model.kind != "qlora" or Path(base := config.model.base).is_dir():
        return
    told = f"{origins.describe(config, 'model.base')}: no folder {base} here"
    if is_path(base):
        raise ModelError(f"{told}; give a folder with the base's config.json, or a name on the Hub")
    if "/" not in base:
        log.warning(f"{told} (looked from {Path.cwd()}/); taken as a name on the Hub")


def is_path(base: str) -> bool:
    """Whether it can be no name on the Hub."""
    return base.startswith(("/", ".", "~"))


def hub_name(config: RunConfig, start: Path) -> str | None:
    """The base's name, where it is one on the Hub; `start`: where the configuration's relative paths begin.

    A folder that is gone, or on another machine, is known by the tokenizer: a folder's is taken from there by itself.
    """
    if config.model.kind != "qlora":
        return None
    base, tokenizer = config.model.base, config.data.tokenizer
    is_folder = (start / base).is_dir() or (tokenizer.kind == "folder" and tokenizer.path == base)
    return None if is_path(base) or is_folder or base.count("/") != 1 else base


@dataclass(frozen=True)
class Linear:
    """Linear layers of one name and shape."""

    name: str
    """The last part of their names, e.g. q_proj."""
    inputs: int
    outputs: int
    count: int
    quantised: bool = True
    """Whether bitsandbytes quantises them, where it is asked to: it leaves out what has a class of its own (Falcon)."""

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs * self.count


@dataclass(frozen=True)
class BaseFacts:
    """Counted without loading weights."""

    architecture: str
    vocab_size: int
    """Rows of the embedding: ids below this can be read."""
    positions: int | None
    """Longest text that it was made for."""
    hidden: int
    layers: int
    heads: int
    kv_width: int
    """Width of the keys of all heads together; smaller than `hidden` where heads share them."""
    linears: tuple[Linear, ...]
    """The linear layers that text goes through, but the output layer and `unread`: LoRA can be added to these."""
    other_parameters: int
    """Embedding, output layer (once if tied), norms, biases: never quantised; and experts."""
    unread: tuple[Linear, ...] = ()
    """The linear layers that text never goes through (Gemma 3's for pictures), or that peft takes for experts (a
    mixture's dense ones): loaded, quantised, and without LoRA."""
    expert_parameters: int = 0
    """Of these, a mixture's experts: LoRA is added to linear layers alone."""
    stacked_experts: int = 0
    """Of these, in tensors of three dimensions: nf4 quantises them."""
    largest_stack: int = 0
    """Of these, the ones of the largest layer."""
    caps_logits: bool = False
    """Whether a soft cap follows the output layer (Gemma 2)."""
    keeps_scores: bool = False
    """Whether its attention keeps a number for each pair of tokens: no fused kernel computes it (Gemma 2, GPT-OSS)."""

    @property
    def linear_parameters(self) -> int:
        return sum(linear.weights for linear in (*self.linears, *self.unread))

    @property
    def unquantised_parameters(self) -> int:
        """Of these, what stays as it is also where the base is quantised."""
        return sum(linear.weights for linear in (*self.linears, *self.unread) if not linear.quantised)

    @property
    def names(self) -> list[str]:
        """Names that LoRA can target, each once."""
        return list(dict.fromkeys(linear.name for linear in self.linears))

    @property
    def inner(self) -> int:
        """Width inside the feed-forward part."""
        return max(linear.inputs for linear in self.linears)

    def targets(self, wanted: list[str] | str) -> list[Linear]:
        """The layers that `model.lora.target_modules` means."""
        return [linear for linear in self.linears if wanted == "all-linear" or linear.name in wanted]

    def tokenizer_problems(self, size: int | None) -> list[str]:
        """What is wrong with a tokenizer of so many ids, if anything; None: not known."""
        if size is None or size <= self.vocab_size:
            return []
        return [
            f"the tokenizer has {size:,} tokens, but the base's embedding only {self.vocab_size:,} rows: "
            "ids beyond it cannot be read. Use the base's own tokenizer (leave data.tokenizer out), or a base whose "
            "embedding was enlarged"
        ]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "BaseFacts":
        values = json.loads(text)
        linears, unread = (tuple(Linear(**each) for each in values.pop(name)) for name in ("linears", "unread"))
        return cls(**values, linears=linears, unread=unread)
