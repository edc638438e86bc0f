"""What a checkpoint was trained with, found from its model's folder: configuration, data, samples' format."""

import contextlib
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import pydantic

from llmtrain import files, log, manifest, origin, prompts, recipe, shards
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
    in_its_run: bool
    """The model lies in its run's folder. A configuration beside a model elsewhere may be a stranger's."""


def find(model: Path) -> Training | None:
    """Of a model in RUN/checkpoints/STEP/model, or in a folder with a run's configuration, as on the Hub.

    Raises:
        ConfigError: the run's configuration is there, and this version cannot read it.
    """
    model = model.resolve()
    places = [(model / "llmtrain/config.yaml", model / "llmtrain"), (model / "config.yaml", model)]
    start = Path.cwd()
    in_its_run = len(model.parents) >= 3 and model.parents[1].name == "checkpoints"
    if in_its_run:
        run = RunDir(model.parents[2])
        places, start = [(run.config, model.parent)], origin.start_of(run)
    for file, described in places:
        if not file.is_file():
            continue
        try:
            return Training(load_config(str(file))[0], file, start, described, in_its_run)
        except ConfigError as error:
            why = "; ".join(error.problems)
            if described != model:
                raise ConfigError([_told_unreadable(file, model, why)]) from None
            _say_ignored(file, why)  # beside any model may lie a file of that name
    return None


def _told_unreadable(file: Path, model: Path, why: str) -> str:
    return (
        f"{file} says what {model} was trained with, and this version of llmtrain cannot read it: {why}. Use the "
        "version that trained it; or copy the model's own files elsewhere and give that folder: then prompts are free "
        "text, and an adapter has its base's tokenizer and no quantisation"
    )


@functools.cache
def _say_ignored(file: Path, why: str) -> None:
    """Once, however often the file is looked for."""
    log.warning(
        f"{file}: not taken for a run's configuration ({why}), so prompts are free text, and an adapter has its base's "
        "tokenizer and no quantisation"
    )


def shards_of(training: Training) -> ShardFolder | None:
    """The run's shards where they are still there, and still those that the checkpoint was trained on.

    Checks the manifest's hash and the tokenizer only: the rows are not needed here.
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
    """What the run's samples were; text where no run is known. The template of a chat is None where it is the model's
    own, else it is there as text.

    Raises:
        ConfigError: the run's configuration cannot be read.
        TokenizerError: the configuration names a file as template that is not there, nor a copy beside the model.
    """
    training = find(model)
    if training is None:
        return TextFormat()
    format = training.config.data.format
    if format.kind != "chat" or format.template is None or "{" in format.template:
        return format
    if (model / prompts.TEMPLATE).is_file() and not _made_the_shards(training):
        return format.model_copy(update={"template": None})
    with contextlib.chdir(training.start):
        try:
            return format.model_copy(update={"template": prompts.read_template(format.template)})
        except TokenizerError:
            raise TokenizerError(
                f"data.format.template={format.template} ({training.file}): this file, the chat template of the run, "
                f"is gone (looked for from {training.start}), and beside the model is no copy; bring it back"
            ) from None


def _made_the_shards(training: Training) -> bool:
    """Whether the file of the chat template is the one that the shards were made with, as far as they are there.

    It may have been edited since, and where it has not, an older version may have left the tokenizer's own template
    beside the model.
    """
    data = shards_of(training)
    if data is None:
        return False
    with contextlib.chdir(training.start):
        now = recipe.recipe_of(training.config)
    return data.manifest.recipe.get("format", {}).get("template_files") == now["format"]["template_files"]
