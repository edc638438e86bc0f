"""Files that exist whole or not at all: written aside, synced to disk, then renamed."""

import hashlib
import os
import secrets
from pathlib import Path

_BLOCK = 1 << 22
_ASIDE = ".tmp-"


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes (about 1 GB/s)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's list of names, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` in one rename; a crash leaves the old file or the new one."""
    aside = path.with_name(f".{path.name}{_ASIDE}{secrets.token_hex(6)}")  # process ids are not unique across machines
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(aside)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def remove_asides(folder: Path) -> None:
    """Delete what kills have left of `write_atomic`; for a folder that nobody else writes to."""
    for aside in folder.glob(f".*{_ASIDE}*"):
        aside.unlink(missing_ok=True)


def expand_home(path: str) -> str:
    """With the home folder in place of ~. Else as it was written: pathlib would make x of ./x, which are two recipes of
    shards, and fails where no user has the name behind ~."""
    return os.path.expanduser(path)  # noqa: PTH111


def is_utf8(text: str) -> bool:
    """Whether a text can be written down: a path or an argument may hold bytes that are no letters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
