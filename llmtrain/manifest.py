"""A checkpoint's manifest: every file with size and SHA-256, and the position in training.

The manifest is written last, so a folder with one was finished. It also guards itself: it holds the
hash of its own content, and a file that differs from what this module would write is rejected.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pydantic

from llmtrain import files
from llmtrain.errors import CheckpointError
from llmtrain.rundir import RunDir

NAME = "manifest.json"
_FOLDERS = ("model", "state")


class _Record(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")


class TrainState(_Record):
    """How far a run has come. With seed, row count, batch size and fingerprint it is the whole data state."""

    step: int = pydantic.Field(default=0, ge=0)
    """Optimizer steps done."""
    samples: int = 0
    """Rows consumed since the start; the next one is at this position of the order."""
    targets: int = 0
    """Supervised tokens consumed."""


class FileInfo(_Record):
    size_bytes: int
    sha256: str


class Manifest(_Record):
    format: Literal["llmtrain-checkpoint-1"] = "llmtrain-checkpoint-1"
    train_state: TrainState
    seed: int
    num_rows: int
    global_batch_size: int
    fingerprint: str
    """Of the data set."""
    world_size: int
    strategy: str
    heldout_loss: float | None
    """Nats per token at this step, as the training ranks computed it."""
    files: dict[str, FileInfo]
    """By path: below model/ or state/."""

    @property
    def epoch(self) -> float:
        """Passes over the training split so far."""
        return self.train_state.samples / self.num_rows

    @property
    def size_bytes(self) -> int:
        """Of all files, without the manifest."""
        return sum(info.size_bytes for info in self.files.values())

    @pydantic.field_validator("files")
    @classmethod
    def _stay_inside(cls, listed: dict[str, FileInfo]) -> dict[str, FileInfo]:
        """Readers join these paths to folders and move what is there; a manifest from the Hub may be a stranger's."""
        for path in listed:
            first, *rest = path.split("/")
            if first not in _FOLDERS or not rest or {"", ".", ".."} & set(rest) or "\0" in path:
                raise ValueError(f"{path!r} is not a path below model/ or state/")
        return listed


def write(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json into `folder`, synced to disk."""
    files.write_atomic(folder / NAME, _render(manifest))


def describe_files(folder: Path, paths: list[Path]) -> dict[str, FileInfo]:
    """Size and hash of files below `folder`, by relative path."""
    return {
        path.relative_to(folder).as_posix(): FileInfo(size_bytes=path.stat().st_size, sha256=files.sha256(path))
        for path in paths
    }


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint, itself checked; the files it lists are not.

    Raises:
        CheckpointError: it is missing or altered.
        OSError: it cannot be read now, which says nothing about it.
    """
    path = folder / NAME
    with _reading(path, "missing; the folder is not a whole checkpoint"):
        content = path.read_bytes()
    try:
        fields: dict[str, Any] = json.loads(content)
        del fields["sha256"]
        manifest = Manifest.model_validate(fields)
    except pydantic.ValidationError as error:
        wrong = error.errors()[0]
        raise CheckpointError(f"{path}: altered ({'.'.join(map(str, wrong['loc']))}: {wrong['msg']})") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: altered ({str(error).splitlines()[0]})") from error
    if _render(manifest) != content:
        raise CheckpointError(f"{path}: altered: its content does not match its own hash")
    return manifest


def identity(manifest: Manifest) -> str:
    """Hash of a checkpoint's whole content: two checkpoints of a step with the same one are the same."""
    fields = manifest.model_dump(mode="json")
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def identities(run: RunDir) -> dict[int, str]:
    """`identity` of a run's published checkpoints, by step; those whose manifest cannot be read are left out."""
    found: dict[int, str] = {}
    for step in run.checkpoint_steps():
        with contextlib.suppress(CheckpointError, OSError):
            stamp = (run.checkpoint(step) / NAME).stat()
            found[step] = _identity(run.checkpoint(step).absolute(), stamp.st_ino, stamp.st_mtime_ns)
    return found


@functools.lru_cache(maxsize=4096)
def _identity(folder: Path, _inode: int, _modified_ns: int) -> str:
    """Kept for as long as the manifest stays the same file: the service asks several times a second."""
    return identity(read(folder))


def verify(folder: Path) -> Manifest:
    """Check every file of a checkpoint against its manifest (about 1 GB/s).

    Raises:
        CheckpointError: names the file that is missing, truncated or altered.
        OSError: names the file that cannot be read now, which says nothing about it.
    """
    manifest = read(folder)
    for name, info in manifest.files.items():
        path = folder / name
        with _reading(path, "missing"):
            size = path.stat().st_size
            if size != info.size_bytes:
                raise CheckpointError(f"{path}: {size} bytes instead of {info.size_bytes}")
            if files.sha256(path) != info.sha256:
                raise CheckpointError(f"{path}: altered: its SHA-256 is not the manifest's")
    return manifest


@contextlib.contextmanager
def _reading(path: Path, if_missing: str) -> Iterator[None]:
    """A file that is not there is the checkpoint's fault; a disk or a network that fails is not, and may pass."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise CheckpointError(f"{path}: {if_missing}") from None
    except OSError as error:
        error.filename = error.filename or str(path)  # an error of reading names none
        raise


def _render(manifest: Manifest) -> bytes:
    fields = manifest.model_dump(mode="json")
    return (json.dumps({**fields, "sha256": identity(manifest)}, indent=1) + "\n").encode()
