"""Repositories of the loopback Hub: commits in memory, large objects on disk."""

import hashlib
import uuid
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from tests.support.hub_wire import Refused

# fmt: off
LFS_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz", ".npy", ".zip", ".tar", ".gz", ".zst", ".distcp",
)
# fmt: on
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


@dataclass(frozen=True)
class File:
    blob_id: str  # what git would call it; of an LFS file, the blob of its pointer
    size: int
    sha256: str | None = None  # of LFS files only
    content: bytes = field(default=b"", repr=False)  # of regular files only

    @classmethod
    def regular(cls, content: bytes) -> Self:
        return cls(git_blob_id(content), len(content), content=content)

    @classmethod
    def large(cls, sha256: str, size: int) -> Self:
        return cls(git_blob_id(pointer(sha256, size)), size, sha256)

    @property
    def etag(self) -> str:
        return self.sha256 or self.blob_id

    def misreported(self) -> "File":
        """The same file under a hash that is not its own."""
        wrong = ("0" if self.etag[0] != "0" else "1") + self.etag[1:]
        return File.large(wrong, self.size) if self.sha256 else replace(self, blob_id=wrong)


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    description: str
    date: str
    tree: dict[str, File]


class Repo:
    """Commits and the names that point at them. Its owner, the Hub, holds the lock."""

    def __init__(self, name: str, private: bool) -> None:
        self.name, self.private = name, private
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.objects: dict[str, int] = {}  # LFS objects that were uploaded to it: sha256 -> size
        self.committed_at: list[float] = []
        self.commit("main", "initial commit", "", {".gitattributes": File.regular(GIT_ATTRIBUTES)})

    def find(self, revision: str) -> Commit:
        """A branch, a tag, or the first characters of a commit."""
        oid = self.branches.get(revision) or self.tags.get(revision)
        oids = [oid] if oid else [o for o in self.commits if len(revision) >= 7 and o.startswith(revision)]
        if not oids:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oids[0]]

    def commit(self, branch: str, title: str, description: str, tree: dict[str, File], orphan: bool = False) -> Commit:
        parent = None if orphan else self.branches.get(branch)
        oid = hashlib.sha1(f"{parent} {title} {uuid.uuid4()}".encode()).hexdigest()
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
        self.commits[oid] = Commit(oid, parent, title, description, date, tree)
        self.branches[branch] = oid
        return self.commits[oid]

    def history(self, revision: str) -> list[Commit]:
        """Newest first."""
        commits, oid = [], self.find(revision).oid
        while oid:
            commits.append(self.commits[oid])
            oid = self.commits[oid].parent
        return commits

    def changes(self, path: str, revision: str = "main") -> list[Commit]:
        history = self.history(revision)
        before = [*(commit.tree.get(path) for commit in history[1:]), None]
        return [commit for commit, old in zip(history, before, strict=True) if commit.tree.get(path) != old]


@dataclass
class Upload:
    """An LFS object that was announced: one piece, or numbered parts that are joined at the end."""

    repo: Repo
    oid: str
    size: int
    parts: dict[int, Path] = field(default_factory=dict)


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def repo_as_json(repo: Repo) -> dict[str, Any]:
    commits = [
        {**vars(c), "tree": {path: [f.blob_id, f.size, f.sha256] for path, f in c.tree.items()}}
        for c in repo.commits.values()
    ]
    return {"private": repo.private, "branches": repo.branches, "tags": repo.tags, "commits": commits}
