"""What a checkpoint was trained with, found from its model's folder: configuration, data, samples' format."""

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path

import pydantic

from llmtrain import files, manifest, origin, prompts, recipe, shards
from llmtrain.config import RunConfig, load_config
from llmtrain.config.data_sections import Format, TextFormat
from llmtrain.errors import CheckpointError, ConfigError, TokenizerError
from llmtrain.rundir import RunDir
from llmtrain.shards import ShardFolder, ShardManifest


@dataclass(frozen=True)
class Training:
    """The run of a checkpoint, as far as it is known."""

    config: RunConfig
    file: Path
    """The configuration's."""
    start: Path
    """Relative paths of the configuration start here."""
    described: Path
    """The folder with the checkpoint's manifest."""


def find(model: Path) -> Training | None:
    """Of a model in RUN/checkpoints/STEP/model, or in a folder with a run's configuration, as on the Hub."""
    model = model.resolve()
    places = [(model / "llmtrain/config.yaml", model / "llmtrain"), (model / "config.yaml", model)]
    start = Path.cwd()
    if len(model.parents) >= 3 and model.parents[1].name == "checkpoints":
        run = RunDir(model.parents[2])
        places, start = [(run.config, model.parent)], origin.start_of(run)
    for file, described in places:
        with contextlib.suppress(ConfigError):
            if file.is_file():
                return Training(load_config(str(file))[0], file, start, described)
    return None


def shards_of(training: Training) -> ShardFolder | None:
    """The run's shards where they are still there, and still those that the checkpoint was trained on.

    Only what says so and the tokenizer are looked at: the rows are nobody's business here.
    """
    folder = shard_folder(training)
    try:
        fingerprint = manifest.read(training.described).fingerprint
        content = (folder / shards.MANIFEST).read_bytes()
        if hashlib.sha256(content).hexdigest() != fingerprint:
            return None
        found = ShardFolder(folder, ShardManifest.model_validate_json(content), fingerprint)
        same = files.sha256(found.tokenizer / "tokenizer.json") == found.manifest.tokenizer.sha256
    except (CheckpointError, OSError, pydantic.ValidationError):
        return None
    return found if same else None


def shard_folder(training: Training) -> Path:
    """Where the run's shards lie, or lay."""
    with contextlib.chdir(training.start):
        return recipe.shard_folder(training.config).resolve()


def format_of(model: Path) -> Format:
    """What the run's samples were, with the text of a chat template that the configuration names as a file; text
    where no run is known.

    Raises:
        TokenizerError: that file is not there, nor a copy beside the model.
    """
    training = find(model)
    if training is None:
        return TextFormat()
    format = training.config.data.format
    if format.kind != "chat" or format.template is None:
        return format
    try:
        with contextlib.chdir(training.start):
            text = prompts.read_template(format.template)
    except TokenizerError:
        if not (model / prompts.TEMPLATE).is_file():
            raise
        text = None  # the one beside the model
    return format.model_copy(update={"template": text})
