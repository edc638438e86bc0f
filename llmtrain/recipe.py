"""What decides the bytes of a data set, and where its shards lie when nobody says."""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any, Literal

from llmtrain import files, shards
from llmtrain.config.schema import RunConfig
from llmtrain.errors import DataMismatch, TokenizerError
from llmtrain.shards import REBUILD, ShardFolder
from llmtrain.source_files import source_files

_LOOK_AT = 10_000
"""Files of the sources whose times are read before a run: on a network's file system each takes a millisecond."""


def recipe_of(config: RunConfig) -> dict[str, Any]:
    """The settings that shards are made from: equal recipes and equal input give equal bytes."""
    data = config.data.model_dump(mode="json", exclude={"dir", "verify"})
    for source in data["sources"]:
        if source["use"] is None:
            del source["use"]  # as `format` below: shards from before there was a `use` keep their recipe
    if config.data.format.kind == "text":
        del data["format"]  # so that shards of text keep the recipe that they had before there were formats
    elif config.data.format.kind == "chat":
        data["format"]["template_files"] = _template_files(config, config.data.format.template)
    return {**data, "context": config.model.context}


def _template_files(config: RunConfig, template: str | None) -> dict[str, str]:
    """Hashes of the files that a chat template may come from: a changed template makes other shards."""
    tokenizer = config.data.tokenizer
    if template is not None:
        paths = [] if "{" in template else [Path(files.expand_home(template))]
    elif tokenizer.kind == "folder":
        folder = Path(tokenizer.path)
        paths = [folder / "chat_template.jinja", folder / "tokenizer_config.json"]
    else:
        paths = []
    return {path.name: files.sha256(path) for path in paths if path.is_file()}


def tokenizer_file(config: RunConfig) -> Path | None:
    """tokenizer.json of a tokenizer that comes from a folder, if it is there to compare with."""
    if config.data.tokenizer.kind != "folder":
        return None
    file = Path(config.data.tokenizer.path) / "tokenizer.json"
    return file if file.is_file() else None


def tokenizer_size(config: RunConfig) -> int | None:
    """How many ids the tokenizer has, from the shards; where there are none yet, as far as that is known without them:
    of one that is trained as many as it was asked for, of one on the Hub None.

    Raises:
        ShardError: there are shards, and they are not whole.
        TokenizerError: its file is not one.
    """
    if shards.exists(folder := shard_folder(config)):
        return shards.open_folder(folder, "size").manifest.tokenizer.vocab_size
    if config.data.tokenizer.kind == "train":
        return config.data.tokenizer.vocab_size
    file = tokenizer_file(config)
    return None if file is None else max(tokenizer_ids(file).values(), default=-1) + 1


def tokenizer_ids(file: Path) -> dict[str, int]:
    """The tokens of a tokenizer.json. Raises TokenizerError: it is none."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    except Exception as error:
        raise TokenizerError(f"{file}: not a tokenizer: {error}") from error


def shard_folder(config: RunConfig) -> Path:
    """`data.dir`, or a folder named after the recipe."""
    if config.data.dir is not None:
        return Path(config.data.dir)
    key = hashlib.sha256(json.dumps(recipe_of(config), sort_keys=True).encode()).hexdigest()
    return Path("shards") / key[:12]


def open_shards(config: RunConfig, verify: Literal["sha256", "size"]) -> ShardFolder:
    """The finished shards of a configuration.

    Raises:
        DataMismatch: they were made by another recipe, or with another tokenizer.
        ShardError, VocabularyError: as `shards.open_folder`.
    """
    opened, tokenizer = shards.open_folder(shard_folder(config), verify), tokenizer_file(config)
    if tokenizer is not None and files.sha256(tokenizer) != opened.manifest.tokenizer.sha256:
        raise DataMismatch(f"{opened.path}: built with another tokenizer than what {tokenizer} is now; {REBUILD}")
    recipe, made_by = recipe_of(config), opened.manifest.recipe
    differences = [
        f"{key}: shards have {have}, the configuration {want}"
        for key in sorted({*recipe, *made_by})
        if (have := made_by.get(key)) != (want := recipe.get(key))
    ]
    if differences:
        raise DataMismatch(
            f"{opened.path}: built by another recipe; " + "; ".join(differences) + ". Set data.dir to another "
            "folder (or leave it out: each recipe then has its own), or rebuild with 'llmtrain shard --force'"
        )
    return opened


def newer_source(config: RunConfig, manifest: Path) -> Path | None:
    """A file of the sources that was written after the shards of this manifest were.

    Shards are not built anew when their text changes: a run has to go on with what it began with. Data sets by name
    are not looked at, and of very many files only the first ones.
    """
    patterns = [path for source in config.data.sources for path in getattr(source, "paths", [])]
    shards_made = manifest.stat().st_mtime
    # What cannot be looked at may be gone, or somebody else's: what the shards hold is not touched by that.
    found = itertools.chain.from_iterable(source_files(pattern, lambda _: None) for pattern in patterns)
    for path in itertools.islice(found, _LOOK_AT):
        try:
            if path.stat().st_mtime > shards_made:
                return path
        except OSError:
            continue
    return None


def describe_newer(path: Path, folder: Path) -> str:
    """For people: what `newer_source` found, and what to do."""
    return (
        f"{path} was written after the shards in {folder}, which hold the text as it was before. If it has changed: "
        "'llmtrain shard CONFIG --force', and a new run.name"
    )
