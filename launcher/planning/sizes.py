"""How large the configured model is, found out without torch."""

import subprocess
import sys
import tempfile
from pathlib import Path

from launcher.planning.base_config import find, read_facts
from llmtrain import memory, recipe
from llmtrain.base_facts import BaseFacts
from llmtrain.config.load import resolved_yaml
from llmtrain.config.schema import RunConfig
from llmtrain.errors import ConfigError, ModelError, UserError
from llmtrain.memory import Sizes
from llmtrain.memory_lora import LoraSizes
from llmtrain.shards import ShardManifest


class UnknownBase(UserError):
    """A base is refused, or cannot be had; leaves with the exit code of the process that asked."""

    def __init__(self, message: str, code: int):
        self.exit_code = code
        super().__init__(message)


def find_sizes(config: RunConfig, vocabulary: int | None, base: str | None, built: ShardManifest | None) -> Sizes:
    """How large the configured model is. Of an unusual base a process of the core's asks transformers (no weights are
    read).

    Raises:
        ConfigError: it would take a download to know.
        ModelError: the base cannot be used with the tokenizer.
        UnknownBase: the base cannot be asked.
    """
    model = config.model
    if model.kind != "qlora":
        return memory.WholeSizes(model, model.rows(vocab_size(config, vocabulary, built)))
    if (facts := read_facts(model, base)) is not None:
        if problems := facts.tokenizer_problems(recipe.tokenizer_size(config)):
            raise ModelError(f"model.base={model.base} cannot be used so:" + "".join(f"\n  - {p}" for p in problems))
        return LoraSizes(model, facts)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "config.yaml"
        file.write_text(resolved_yaml(config), encoding="utf-8")
        overrides = [] if base is None else [f"model.base={base}"]
        command = [sys.executable, "-m", "llmtrain.inspect_base", str(file), *overrides]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().removeprefix("error: ")
        if find(base or model.base, model.revision) is None:  # else it was read, or downloaded, and refused
            hint = "" if base else "; where it cannot be reached, give --base-config FOLDER with its config.json"
            said += f"\nwhat {model.base} is made of is not known{hint}"
        raise UnknownBase(said, done.returncode)
    return LoraSizes(model, BaseFacts.from_json(done.stdout.splitlines()[-1]))


def vocab_size(config: RunConfig, given: int | None, built: ShardManifest | None) -> int:
    """As given; else from the shards if they are built, else from the tokenizer's settings.

    Raises:
        ConfigError: it would take a download to know.
    """
    if given is not None:
        return given
    if built is not None:
        return built.tokenizer.vocab_size
    tokenizer = config.data.tokenizer
    if (size := recipe.tokenizer_size(config)) is not None:
        return size
    if tokenizer.kind == "folder":
        raise ConfigError(
            [f"data.tokenizer.path={tokenizer.path}: there is no tokenizer.json in it; --vocab-size will do for a plan"]
        )
    assert tokenizer.kind == "hub"
    raise ConfigError(
        [
            f"the vocabulary of {tokenizer.name} is not known yet: "
            "run 'llmtrain shard CONFIG' first, or give 'llmtrain plan' --vocab-size"
        ]
    )
