"""The files that a source of data names: nothing that cannot be looked at is passed over in silence."""

import errno
import fnmatch
import glob
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from llmtrain import files, log

TEXT_SUFFIXES = (".txt", ".md")
"""What is read of a folder that a source names."""
_LEADS_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
"""What a link says whose target is gone, or is the link itself."""

OnError = Callable[[OSError], None]
"""Is given what cannot be looked at, with its name; the rest is found all the same."""


def source_files(pattern: str, on_error: OnError) -> Iterator[Path]:
    """The files that one of a source's `paths` means: a folder's text files, what a glob matches, or the file."""
    path, is_glob = Path(files.expand_home(pattern)), glob.has_magic(pattern)
    mode = _mode(path, _ignore if is_glob else on_error)
    if stat.S_ISDIR(mode):
        yield from _text_files(path, on_error)
    elif is_glob:
        yield from _matches(Path(path.anchor), [part for part in path.parts if part != path.anchor], on_error)
    elif mode:
        yield path


def _ignore(_: OSError) -> None:
    pass


def _mode(path: Path, on_error: OnError) -> int:
    """What kind of thing a path leads to; 0 where there is none. How much of this pathlib says depends on Python's
    version."""
    try:
        return path.stat().st_mode
    except OSError as error:
        if error.errno not in _LEADS_NOWHERE:
            on_error(error)
    except ValueError:  # no path has such a character
        pass
    return 0


def _matches(folder: Path, parts: list[str], on_error: OnError) -> Iterator[Path]:
    """The files that the parts of a glob mean in a folder: as `glob.iglob`, which passes over what it cannot list."""
    part, *rest = parts
    if part == "**" and not rest:
        rest = ["*"]
    if not glob.has_magic(part):
        mode = _mode(folder / part, on_error)
        if rest and stat.S_ISDIR(mode):
            yield from _matches(folder / part, rest, on_error)
        elif not rest and stat.S_ISREG(mode):
            yield folder / part
        return
    if part == "**":
        yield from _matches(folder, rest, on_error)
    for entry in _list(folder, on_error):
        is_hidden = entry.name.startswith(".")
        if part == "**":
            if not is_hidden and _kind(entry, on_error) == "folder":
                yield from _matches(folder / entry.name, [part, *rest], on_error)
        elif fnmatch.fnmatchcase(entry.name, part) and (part.startswith(".") or not is_hidden):
            kind = _kind(entry, on_error)
            if rest and kind == "folder":
                yield from _matches(folder / entry.name, rest, on_error)
            elif not rest and kind == "file":
                yield folder / entry.name


def _list(folder: Path, on_error: OnError) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as listed:
            return list(listed)
    except OSError as error:
        on_error(error)
        return []


def _kind(entry: os.DirEntry[str], on_error: OnError) -> Literal["folder", "file"] | None:
    """Also of what a link leads to."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else None
    except OSError as error:
        if error.errno not in _LEADS_NOWHERE:
            on_error(error)
        return None


def _text_files(root: Path, on_error: OnError) -> Iterator[Path]:
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


def _look_into(folder: Path, on_error: OnError) -> Iterator[tuple[Path, Literal["text", "folder", "link"]]]:
    """The text files of a folder, the folders right below it, and the links to folders."""
    for entry in _list(folder, on_error):
        path, kind = folder / entry.name, _kind(entry, on_error)
        if kind == "folder":
            yield path, "link" if entry.is_symlink() else "folder"
        elif kind == "file" and path.suffix in TEXT_SUFFIXES:
            yield path, "text"
