"""What decides the bytes of a data set, and where its shards lie when nobody says."""

import errno
import glob
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from llmtrain import files, log, shards
from llmtrain.config.schema import RunConfig
from llmtrain.errors import TokenizerError

_LOOK_AT = 10_000
"""Files of the sources whose times are read before a run: on a network's file system each takes a millisecond."""
_LEADS_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
"""What a link says whose target is gone, or is the link itself."""


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
    if (file := tokenizer_file(config)) is None:
        return None
    from tokenizers import Tokenizer

    try:
        ids = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True).values()
    except Exception as error:
        raise TokenizerError(f"{file}: not a tokenizer: {error}") from error
    return max(ids, default=-1) + 1


def shard_folder(config: RunConfig) -> Path:
    """`data.dir`, or a folder named after the recipe."""
    if config.data.dir is not None:
        return Path(config.data.dir)
    key = hashlib.sha256(json.dumps(recipe_of(config), sort_keys=True).encode()).hexdigest()
    return Path("shards") / key[:12]


TEXT_SUFFIXES = (".txt", ".md")
"""What is read of a folder that a source names."""


def _raise(error: OSError) -> None:
    raise error


def source_files(pattern: str, on_error: Callable[[OSError], None] = _raise) -> Iterator[Path]:
    """The files that one of a source's `paths` means: a folder's text files, what a glob matches, or the file.

    Args:
        on_error: is given what cannot be looked at, with its name; the rest is found all the same.
    """
    path = Path(files.expand_home(pattern))
    try:
        if path.is_dir():
            return _text_files(path, on_error)
        if glob.has_magic(pattern):
            return (Path(file) for file in glob.iglob(str(path), recursive=True) if Path(file).is_file())
        return iter([path] if path.exists() else [])
    except OSError as error:
        on_error(error)
        return iter(())


def _text_files(root: Path, on_error: Callable[[OSError], None]) -> Iterator[Path]:
    """The text files below a folder, and below the folders that links there lead to: each real folder once.

    What no link is needed for comes first, so that a link never changes the path under which a file is found. A link
    that leads upwards is not followed: it would bring in all that lies beside the folder.
    """
    real_root = root.resolve()
    seen: set[Path] = set()
    upwards: list[Path] = []
    starts = [root]
    while starts:
        links: list[Path] = []
        for start in starts:
            folders = [(start, start.resolve())]
            while folders:
                folder, real = folders.pop()
                if real in seen:
                    continue
                seen.add(real)
                for path, kind in _look_into(folder, on_error):
                    if kind == "text":
                        yield path
                    elif kind == "folder":
                        folders.append((path, real / path.name))
                    elif any(below.is_relative_to(path.resolve()) for below in (real_root, real)):
                        upwards.append(path)
                    else:
                        links.append(path)
        starts = sorted(links)
    if upwards:
        first = min(upwards)
        more = f" (and {len(upwards) - 1} more)" if len(upwards) > 1 else ""
        log.warn_once(f"data       {first} leads upwards, to {first.resolve()}: this link is not followed{more}")


def _look_into(
    folder: Path, on_error: Callable[[OSError], None]
) -> Iterator[tuple[Path, Literal["text", "folder", "link"]]]:
    """The text files of a folder, the folders right below it, and the links to folders."""
    try:
        with os.scandir(folder) as listed:
            entries = list(listed)
    except OSError as error:
        on_error(error)
        return
    for entry in entries:
        path = folder / entry.name
        try:
            if entry.is_dir():
                kind = "link" if entry.is_symlink() else "folder"
            elif path.suffix in TEXT_SUFFIXES and entry.is_file():
                kind = "text"
            else:
                continue
        except OSError as error:
            if error.errno not in _LEADS_NOWHERE:
                on_error(error)
            continue
        yield path, kind


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


def told_newer(path: Path, folder: Path) -> str:
    """For people: what `newer_source` found, and what to do."""
    return (
        f"{path} was written after the shards in {folder}, which hold the text as it was before. If it has changed: "
        "'llmtrain shard CONFIG --force', and a new run.name"
    )
