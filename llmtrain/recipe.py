"""What decides the bytes of a data set, and where its shards lie when nobody says."""

import hashlib
import json
from pathlib import Path
from typing import Any

from llmtrain import files
from llmtrain.config.schema import RunConfig


def recipe_of(config: RunConfig) -> dict[str, Any]:
    """The settings that shards are made from: equal recipes and equal input give equal bytes."""
    data = config.data.model_dump(mode="json", exclude={"dir", "verify"})
    if config.data.format.kind == "text":
        del data["format"]  # so that shards of text keep the recipe that they had before there were formats
    elif config.data.format.kind == "chat":
        data["format"]["template_files"] = _template_files(config, config.data.format.template)
    return {**data, "context": config.model.context}


def _template_files(config: RunConfig, template: str | None) -> dict[str, str]:
    """Hashes of the files that a chat template may come from: a changed template makes other shards."""
    tokenizer = config.data.tokenizer
    if template is not None:
        paths = [] if "{" in template else [Path(template).expanduser()]
    elif tokenizer.kind == "folder":
        folder = Path(tokenizer.path).expanduser()
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


def shard_folder(config: RunConfig) -> Path:
    """`data.dir`, or a folder named after the recipe."""
    if config.data.dir is not None:
        return Path(config.data.dir)
    key = hashlib.sha256(json.dumps(recipe_of(config), sort_keys=True).encode()).hexdigest()
    return Path("shards") / key[:12]
