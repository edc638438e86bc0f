"""A Hugging Face Hub on the loopback, for the real client: repositories in memory, large objects on disk.

In a test's own process it is `with Hub(folder) as hub:`; where it has to outlive or be outlived by others it is a
process, `python -m tests.support.hub_server --folder DIR --port-file FILE`, and tests hold a `HubProcess`.
What can go wrong on command is in hub_faults.py.
"""

import argparse
import base64
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlencode

import yaml

from tests.support.hub_faults import CONTROL, Answer, Entry, Faults, Refused, Request, Server, quota_refusal

TOKEN = "hf_" + "x" * 34
# fmt: off
LFS_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz", ".npy", ".zip", ".tar", ".gz", ".zst", ".distcp",
)
# fmt: on
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
STORAGE = "/_storage/"


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


@dataclass(eq=False)
class Hub:
    """All that the server knows, and what tests ask it."""

    folder: Path
    tokens: dict[str, str] = field(default_factory=lambda: {TOKEN: "write"})  # or "read"
    user: str = "tester"
    lfs_above_bytes: int = 10 << 20
    multipart_above_bytes: int = 64 << 20
    part_bytes: int = 16 << 20
    page_size: int = 1000
    commit_quota: int | None = None  # commits per repository and window; the real Hub's is 128
    quota_window_s: float = 3600
    empty_commits: bool = False  # whether a commit without a change is made, or the head is answered
    control: bool = True

    def __post_init__(self) -> None:
        self.faults, self.closing, self.lock = Faults(), threading.Event(), threading.RLock()
        self.log: list[Entry] = []
        self.bugs: list[str] = []  # tracebacks of the server's own mistakes
        self.repos: dict[str, Repo] = {}
        self.uploads: dict[str, Upload] = {}
        self.port = 0
        self._server: Server | None = None
        for name in ("lfs", "uploads"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    # Life

    def start(self) -> Self:
        """Listens; after a stop on the same port, with all that was stored."""
        self.closing.clear()
        self._server = Server(("127.0.0.1", self.port), self)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def stop(self) -> None:
        """Ends all connections, those that hang included."""
        if self._server:
            self.closing.set()
            self._server.shutdown()
            self._server.cut_all()
            self._server.server_close()
            self._server = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # What tests ask

    def files(self, repo: str, revision: str = "main") -> dict[str, File]:
        return dict(self.repos[repo].find(revision).tree)

    def read(self, repo: str, path: str, revision: str = "main") -> bytes:
        file = self.files(repo, revision)[path]
        return self.object_path(file.sha256).read_bytes() if file.sha256 else file.content

    def commits(self, repo: str, revision: str = "main") -> list[Commit]:
        """Newest first."""
        return self.repos[repo].history(revision)

    def changes(self, repo: str, path: str, revision: str = "main") -> list[Commit]:
        """The commits that changed this path, newest first."""
        return self.repos[repo].changes(path, revision)

    def received_bytes(self, sha256: str) -> int:
        """Of this object, over all attempts, also those that did not come to their end."""
        return sum(entry.received for entry in self._puts(sha256))

    def transfers(self, sha256: str) -> int:
        """How many times this object came in full, whatever was answered."""
        with self.lock:
            size = next((u.size for u in self.uploads.values() if u.oid == sha256), 0)
        return sum(entry.received for entry in self._puts(sha256) if entry.complete) // size if size else 0

    def _puts(self, sha256: str) -> list[Entry]:
        return [e for e in self.log if e.method == "PUT" and e.path.startswith(f"{STORAGE}{sha256}/")]

    def state(self) -> dict[str, Any]:
        """All of it as plain data, for tests outside this process."""
        with self.lock:
            return {
                "repos": {name: repo_as_json(repo) for name, repo in self.repos.items()},
                "transfers": {oid: self.transfers(oid) for oid in {u.oid for u in self.uploads.values()}},
                "log": [asdict(entry) for entry in self.log],
                "bugs": self.bugs,
            }

    # What the server asks

    def answer(self, request: Request) -> Answer:
        for method, pattern, respond in [*ROUTES, *(CONTROLS if self.control else [])]:
            found = re.fullmatch(pattern, request.path)
            if found and request.method in method.split():
                return respond(self, request, *map(unquote, found.groups()))
        raise Refused(404, f"Sorry, we can't find the page you are looking for: {request.method} {request.path}")

    def role(self, request: Request) -> str:
        """Empty for someone without a token."""
        if request.token and request.token not in self.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.tokens.get(request.token, "")

    def may_write(self, request: Request) -> None:
        role = self.role(request)
        if not role:
            raise Refused(401, "Invalid username or password.")
        if role != "write":
            raise Refused(403, "You need a token with write access to do this")

    def open(self, request: Request, name: str, write: bool = False) -> Repo:
        role, repo = self.role(request), self.repos.get(name)
        if repo is None or (repo.private and not role):  # the same answer: who may not read it shall not know of it
            raise Refused(404, "Repository not found", "RepoNotFound")
        if write:
            self.may_write(request)
        return repo

    def object_path(self, sha256: str) -> Path:
        return self.folder / "lfs" / sha256

    def spend_quota(self, repo: Repo) -> None:
        if self.commit_quota is None:
            return
        now = time.monotonic()
        repo.committed_at = [at for at in repo.committed_at if at > now - self.quota_window_s]
        if len(repo.committed_at) >= self.commit_quota:
            wait_s = repo.committed_at[0] + self.quota_window_s - now
            raise quota_refusal(self.commit_quota, math.ceil(wait_s / 60))
        repo.committed_at.append(now)


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def as_json(data: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(status, json.dumps(data).encode(), headers)


def repo_as_json(repo: Repo) -> dict[str, Any]:
    commits = [
        {**vars(c), "tree": {path: [f.blob_id, f.size, f.sha256] for path, f in c.tree.items()}}
        for c in repo.commits.values()
    ]
    return {"private": repo.private, "branches": repo.branches, "tags": repo.tags, "commits": commits}


# Accounts and repositories


def whoami(hub: Hub, request: Request) -> Answer:
    role = hub.role(request)
    if not role:
        raise Refused(401, "Invalid username or password.")
    token = {"displayName": "test", "role": role, "createdAt": "2026-01-01T00:00:00.000Z"}
    auth = {"type": "access_token", "accessToken": token}
    return as_json({"type": "user", "id": "1", "name": hub.user, "fullname": hub.user, "orgs": [], "auth": auth})


def validate_yaml(hub: Hub, request: Request) -> Answer:
    """A model card's metadata. The real Hub checks more fields, and answers in the same form."""
    card = re.match(r"\s*---\r?\n(.*?)\r?\n---", request.body.json()["content"], re.DOTALL)
    if not card:
        return as_json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
    errors = [{"message": message} for message in card_errors(card[1])]
    return as_json({"errors": errors, "warnings": []}, 400 if errors else 200)


def card_errors(text: str) -> list[str]:
    try:
        metadata = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"]
    if not isinstance(metadata, dict):
        return ["metadata must be a mapping"]
    one = [name for name in ("license", "library_name", "pipeline_tag") if not isinstance(metadata.get(name, ""), str)]
    lists = {name: metadata.get(name, []) for name in ("tags", "language", "datasets", "base_model")}
    # `language: no` is the classic: YAML reads it as False.
    many = [n for n, value in lists.items() if any(not isinstance(v, str) for v in as_list(value))]
    return [f'"{name}" must be a string' for name in one + many]


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def create_repo(hub: Hub, request: Request) -> Answer:
    wish = request.body.json()
    hub.may_write(request)
    name = f"{wish.get('organization') or hub.user}/{wish['name']}"
    url = f"{hub.endpoint}/{name}"
    private = wish.get("visibility") == "private" or bool(wish.get("private"))
    if request.fault and request.fault.kind == "wrong_visibility":
        private = not private
    with hub.lock:
        if name in hub.repos:
            return as_json({"error": "You already created this model repo", "url": url}, 409)
        hub.repos[name] = Repo(name, private)
    return as_json({"url": url, "name": name, "id": name})


def delete_repo(hub: Hub, request: Request) -> Answer:
    wish = request.body.json()
    name = f"{wish.get('organization') or hub.user}/{wish['name']}"
    hub.open(request, name, write=True)
    del hub.repos[name]
    return as_json({})


def change_settings(hub: Hub, request: Request, name: str) -> Answer:
    repo, wish = hub.open(request, name, write=True), request.body.json()
    repo.private = wish.get("visibility", "private" if repo.private else "public") == "private"
    return as_json({"visibility": "private" if repo.private else "public"})


def repo_info(hub: Hub, request: Request, name: str, revision: str = "main") -> Answer:
    repo = hub.open(request, name)
    commit, first = repo.find(revision), repo.history("main")[-1]
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.tree)]
    if request.query.get("blobs"):
        for sibling in siblings:
            listed = listing(hub, repo, commit, sibling["rfilename"])
            lfs = {"sha256": listed["lfs"]["oid"], **listed["lfs"]} if "lfs" in listed else None
            sibling |= {"blobId": listed["oid"], "size": listed["size"], **({"lfs": lfs} if lfs else {})}
    return as_json(
        {
            "_id": name,
            "id": name,
            "modelId": name,
            "author": name.partition("/")[0],
            "sha": commit.oid,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "createdAt": first.date,
            "lastModified": commit.date,
            "siblings": siblings,
            "usedStorage": sum(repo.objects.values()),
        }
    )


# Names of commits


def list_refs(hub: Hub, request: Request, name: str) -> Answer:
    repo = hub.open(request, name)

    def refs(kind: str, named: dict[str, str]) -> list[dict[str, str]]:
        return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": oid} for n, oid in sorted(named.items())]

    with hub.lock:
        branches, tags = refs("heads", repo.branches), refs("tags", repo.tags)
    return as_json({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})


def create_branch(hub: Hub, request: Request, name: str, branch: str) -> Answer:
    repo, wish = hub.open(request, name, write=True), request.body.json()
    with hub.lock:
        if branch in repo.branches:
            raise Refused(409, f"Reference already exists: refs/heads/{branch}")
        repo.branches[branch] = repo.find(wish.get("startingPoint") or "main").oid
    return as_json({})


def delete_branch(hub: Hub, request: Request, name: str, branch: str) -> Answer:
    repo = hub.open(request, name, write=True)
    if branch == "main":
        raise Refused(403, "The main branch cannot be deleted")
    with hub.lock:
        if repo.branches.pop(branch, None) is None:
            raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
    return as_json({})


def create_tag(hub: Hub, request: Request, name: str, revision: str) -> Answer:
    repo, tag = hub.open(request, name, write=True), request.body.json()["tag"]
    with hub.lock:
        commit = repo.find(revision)
        if tag in repo.tags:
            raise Refused(409, f"Tag reference exists already: refs/tags/{tag}")
        repo.tags[tag] = commit.oid
    return as_json({})


def delete_tag(hub: Hub, request: Request, name: str, tag: str) -> Answer:
    repo = hub.open(request, name, write=True)
    with hub.lock:
        if repo.tags.pop(tag, None) is None:
            raise Refused(404, f"Invalid rev id: {tag}", "RevisionNotFound")
    return as_json({})


def squash(hub: Hub, request: Request, name: str, branch: str) -> Answer:
    """One commit without a parent in place of a branch's history; tags keep theirs."""
    repo, message = hub.open(request, name, write=True), request.body.json()["message"]
    with hub.lock:
        if branch not in repo.branches:
            repo.find(branch)  # a revision that does not exist has an answer of its own
            raise Refused(400, f"Invalid reference for a branch: {branch}")
        repo.commit(branch, message, "", repo.find(branch).tree, orphan=True)
    return as_json({})


# Uploading


def preupload(hub: Hub, request: Request, name: str, revision: str) -> Answer:
    repo, wish = hub.open(request, name, write=True), request.body.json()
    tree = repo.find(revision).tree
    return as_json({"files": [upload_mode(hub, tree, file) for file in wish["files"]]})


def upload_mode(hub: Hub, tree: dict[str, File], file: dict[str, Any]) -> dict[str, Any]:
    binary = b"\0" in base64.b64decode(file["sample"])
    large = file["path"].endswith(LFS_SUFFIXES) or file["size"] > hub.lfs_above_bytes or binary
    known = tree.get(file["path"])
    mode = "lfs" if large else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **({"oid": known.etag} if known else {})}


def lfs_batch(hub: Hub, request: Request, name: str) -> Answer:
    repo = hub.open(request, name, write=True)
    objects = [announce(hub, repo, wish["oid"], wish["size"]) for wish in request.body.json()["objects"]]
    parts = any("chunk_size" in o.get("actions", {}).get("upload", {}).get("header", {}) for o in objects)
    return as_json({"transfer": "multipart" if parts else "basic", "objects": objects})


def announce(hub: Hub, repo: Repo, oid: str, size: int) -> dict[str, Any]:
    """How to upload an object; no actions for one that is stored."""
    known: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
    if oid in repo.objects:
        return known
    key = uuid.uuid4().hex
    with hub.lock:
        hub.uploads[key] = Upload(repo, oid, size)
    href = f"{hub.endpoint}{STORAGE}{oid}/{key}"
    upload: dict[str, Any] = {"href": href}
    if size > hub.multipart_above_bytes:
        numbers = range(1, -(-size // hub.part_bytes) + 1)
        header = {str(n): f"{href}/{n}" for n in numbers}
        upload = {"href": f"{href}/complete", "header": {"chunk_size": str(hub.part_bytes), **header}}
    verify = {"href": f"{hub.endpoint}/{repo.name}.git/info/lfs/objects/verify"}
    return {**known, "actions": {"upload": upload, "verify": verify}}


def put_part(hub: Hub, request: Request, oid: str, key: str, number: str = "0") -> Answer:
    """The storage asks for no token: the address is the permission, as with a signed one."""
    upload = find_upload(hub, key, oid)
    path = hub.folder / "uploads" / f"{key}.{number}.{uuid.uuid4().hex}"
    digest = hashlib.md5()
    try:
        with path.open("wb") as file:
            for piece in request.body.pieces():
                digest.update(piece)
                file.write(piece)
        if number == "0":
            store(hub, upload, [path])
        else:
            upload.parts[int(number)] = path
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return Answer(200, headers={"ETag": f'"{digest.hexdigest()}"'})


def complete_upload(hub: Hub, request: Request, oid: str, key: str) -> Answer:
    """Once more after a lost answer is no error."""
    upload, wish = find_upload(hub, key, oid), request.body.json()
    if oid not in upload.repo.objects:
        missing = [part["partNumber"] for part in wish["parts"] if part["partNumber"] not in upload.parts]
        if missing:
            raise Refused(400, f"Parts are missing: {missing}")
        store(hub, upload, [upload.parts[part["partNumber"]] for part in wish["parts"]])
    return as_json({"success": True})


def find_upload(hub: Hub, key: str, oid: str) -> Upload:
    upload = hub.uploads.get(key)
    if upload is None or upload.oid != oid:
        raise Refused(403, "The signature does not match")
    return upload


def store(hub: Hub, upload: Upload, parts: list[Path]) -> None:
    """Only what has the size and the hash that were announced becomes an object."""
    whole, digest = parts[0], hashlib.sha256()
    with whole.open("ab") as file:
        for part in parts[1:]:
            with part.open("rb") as source:
                shutil.copyfileobj(source, file)
            part.unlink()
    with whole.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    size = whole.stat().st_size
    if (digest.hexdigest(), size) != (upload.oid, upload.size):
        raise Refused(400, f"BadDigest: {size} bytes that are not the {upload.size} bytes of {upload.oid}")
    with hub.lock:
        whole.replace(hub.object_path(upload.oid))
        upload.repo.objects[upload.oid] = size


def verify_object(hub: Hub, request: Request, name: str) -> Answer:
    repo, wish = hub.open(request, name, write=True), request.body.json()
    if repo.objects.get(wish["oid"]) != wish["size"]:
        raise Refused(404, f"Object {wish['oid']} is not stored with {wish['size']} bytes")
    return as_json({})


def commit(hub: Hub, request: Request, name: str, branch: str) -> Answer:
    repo = hub.open(request, name, write=True)
    header, *operations = [json.loads(line) for line in request.body.all().splitlines() if line.strip()]
    wish = header["value"]
    with hub.lock:
        head = repo.find(branch)
        if branch not in repo.branches:
            raise Refused(400, f"Invalid reference for a branch: {branch}")
        if wish.get("parentCommit") not in (None, head.oid):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(head.tree)
        for operation in operations:
            apply(repo, tree, operation["key"], operation["value"])
        if tree != head.tree or hub.empty_commits:
            hub.spend_quota(repo)
            title, _, rest = wish["summary"].partition("\n")
            description = "\n\n".join(part for part in (rest.strip(), wish.get("description", "")) if part)
            head = repo.commit(branch, title, description, tree)
    url = f"{hub.endpoint}/{name}/commit/{head.oid}"
    return as_json({"success": True, "commitOid": head.oid, "commitUrl": url, "hookOutput": ""})


def apply(repo: Repo, tree: dict[str, File], kind: str, wish: dict[str, Any]) -> None:
    """One operation of a commit, on a copy of the head's tree."""
    path = wish["path"]
    match kind:
        case "file":
            encoded = wish.get("encoding") == "base64"
            tree[path] = File.regular(base64.b64decode(wish["content"]) if encoded else wish["content"].encode())
        case "lfsFile":
            # Copies come without a size. The repository knows it.
            if wish["oid"] not in repo.objects or wish.get("size") not in (None, repo.objects[wish["oid"]]):
                reason = "Your push was rejected because an LFS pointer pointed to a file that does not exist."
                raise Refused(400, f"{reason} Offending file: - {path}")
            tree[path] = File.large(wish["oid"], repo.objects[wish["oid"]])
        case "deletedFile" | "deletedFolder":
            inside = path.rstrip("/") + "/"
            gone = [p for p in tree if (p.startswith(inside) if kind == "deletedFolder" else p == path)]
            if not gone:
                raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for old in gone:
                del tree[old]
        case _:
            raise Refused(400, f"Unknown operation: {kind}")


# Reading


def listing(hub: Hub, repo: Repo, commit: Commit, path: str, expand: bool = False) -> dict[str, Any]:
    """A file as the tree and paths-info tell it."""
    file = commit.tree[path]
    if hub.faults.lies_about(path):
        file = file.misreported()
    told: dict[str, Any] = {"type": "file", "oid": file.blob_id, "size": file.size, "path": path}
    if file.sha256:
        size = len(pointer(file.sha256, file.size))
        told["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": size}
    if expand:
        last = repo.changes(path, commit.oid)[0]
        told["lastCommit"] = {"id": last.oid, "title": last.title, "date": last.date}
    return told


def folder_listing(commit: Commit, path: str) -> dict[str, Any]:
    inside = sorted((p, f.blob_id) for p, f in commit.tree.items() if p.startswith(path + "/"))
    return {"type": "directory", "oid": hashlib.sha1(repr(inside).encode()).hexdigest(), "size": 0, "path": path}


def list_tree(hub: Hub, request: Request, name: str, revision: str, folder: str = "") -> Answer:
    repo = hub.open(request, name)
    commit, start = repo.find(revision), f"{folder}/" if folder else ""
    recursive, expand = (request.query.get(flag, "").lower() in ("true", "1") for flag in ("recursive", "expand"))
    files = [path for path in sorted(commit.tree) if path.startswith(start)]
    if folder and not files:
        raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
    folders = {str(parent) for path in files for parent in Path(path).parents} - {"."}
    paths = [p for p in sorted({*files, *folders}) if p.startswith(start) and (recursive or "/" not in p[len(start) :])]
    page, link = one_page(hub, request, paths)
    told = [folder_listing(commit, p) if p in folders else listing(hub, repo, commit, p, expand) for p in page]
    return as_json(told, **link)


def one_page(hub: Hub, request: Request, items: list[Any]) -> tuple[list[Any], dict[str, str]]:
    """A part of a listing and, unless it is the last, the header that leads to the next."""
    start = int(request.query.get("cursor", 0))
    end = start + hub.page_size
    if end >= len(items):
        return items[start:], {}
    query = urlencode({**request.query, "cursor": end})
    return items[start:end], {"Link": f'<{hub.endpoint}{request.path}?{query}>; rel="next"'}


def paths_info(hub: Hub, request: Request, name: str, revision: str) -> Answer:
    """Paths that do not exist are left out."""
    repo = hub.open(request, name)
    commit, form = repo.find(revision), parse_qs(request.body.all().decode())
    expand = form.get("expand", [""])[0].lower() == "true"
    told = []
    for path in form.get("paths", []):
        if path in commit.tree:
            told.append(listing(hub, repo, commit, path, expand))
        elif any(p.startswith(path.rstrip("/") + "/") for p in commit.tree):
            told.append(folder_listing(commit, path.rstrip("/")))
    return as_json(told)


def list_commits(hub: Hub, request: Request, name: str, revision: str) -> Answer:
    page, link = one_page(hub, request, hub.open(request, name).history(revision))
    authors = [{"user": hub.user, "avatar": ""}]
    told = [{"id": c.oid, "title": c.title, "message": c.description, "authors": authors, "date": c.date} for c in page]
    return as_json(told, **link)


def resolve(hub: Hub, request: Request, name: str, revision: str, path: str) -> Answer:
    """A file's bytes; the real Hub sends the client on to its storage for large ones."""
    commit = hub.open(request, name).find(revision)
    file = commit.tree.get(path)
    if file is None:
        refused = Refused(404, "Entry not found", "EntryNotFound")
        refused.answer.headers["X-Repo-Commit"] = commit.oid
        raise refused
    etag = (file.misreported() if hub.faults.lies_about(path) else file).etag
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
    headers["Content-Type"] = "application/octet-stream"
    if file.sha256:
        headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(file.size)}
    answer = Answer(200, hub.object_path(file.sha256) if file.sha256 else file.content, headers)
    return part_of(answer, request.headers.get("Range", ""), file.size)


def part_of(answer: Answer, wish: str, size: int) -> Answer:
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", wish)
    if not asked or not any(asked.groups()):
        return answer
    first = int(asked[1]) if asked[1] else max(0, size - int(asked[2]))
    last = min(int(asked[2]), size - 1) if asked[1] and asked[2] else size - 1
    if first > last:
        return Answer(416, headers={"Content-Range": f"bytes */{size}"})
    headers = {**answer.headers, "Content-Range": f"bytes {first}-{last}/{size}"}
    return Answer(206, answer.content, headers, first, last - first + 1)


# Control from outside the process


def set_faults(hub: Hub, request: Request) -> Answer:
    """{clear, add: [fields of a Fault], every_nth: {n, kinds, seed, exclude}, set: {a setting of the Hub: value}}."""
    wish = request.body.json()
    if wish.get("clear"):
        hub.faults.clear()
    try:
        for fault in wish.get("add", []):
            hub.faults.add(**fault)
        if "every_nth" in wish:
            hub.faults.every_nth(**wish["every_nth"])
    except (TypeError, ValueError) as error:
        raise Refused(400, str(error)) from error
    for name, value in wish.get("set", {}).items():
        if name not in SETTINGS:
            raise Refused(400, f"{name!r} is not a setting; use one of {', '.join(SETTINGS)}")
        setattr(hub, name, value)
    return as_json({})


SETTINGS = (
    "tokens",  # {token: "read" or "write"}
    "lfs_above_bytes",
    "multipart_above_bytes",
    "part_bytes",
    "page_size",
    "commit_quota",
    "quota_window_s",
    "empty_commits",
)


def tell_state(hub: Hub, request: Request) -> Answer:
    return as_json(hub.state())


# Paths stay quoted until they have been taken apart, so that a branch may have a slash in its name.
NAME, REST = "([^/]+/[^/]+)", "([^/]+)"
API = f"/api/models/{NAME}"
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("POST", "/api/repos/create", create_repo),
    ("DELETE", "/api/repos/delete", delete_repo),
    ("PUT", f"{API}/settings", change_settings),
    ("GET", f"{API}/refs", list_refs),
    ("POST", f"{API}/branch/{REST}", create_branch),
    ("DELETE", f"{API}/branch/{REST}", delete_branch),
    ("POST", f"{API}/tag/{REST}", create_tag),
    ("DELETE", f"{API}/tag/{REST}", delete_tag),
    ("POST", f"{API}/super-squash/{REST}", squash),
    ("POST", f"{API}/preupload/{REST}", preupload),
    ("POST", f"/{NAME}\\.git/info/lfs/objects/batch", lfs_batch),
    ("POST", f"/{NAME}\\.git/info/lfs/objects/verify", verify_object),
    ("PUT", f"{STORAGE}{REST}/{REST}", put_part),
    ("PUT", f"{STORAGE}{REST}/{REST}/(\\d+)", put_part),
    ("POST", f"{STORAGE}{REST}/{REST}/complete", complete_upload),
    ("POST", f"{API}/commit/{REST}", commit),
    ("GET", f"{API}/tree/{REST}", list_tree),
    ("GET", f"{API}/tree/{REST}/(.+)", list_tree),
    ("POST", f"{API}/paths-info/{REST}", paths_info),
    ("GET", f"{API}/commits/{REST}", list_commits),
    ("GET", API, repo_info),
    ("GET", f"{API}/revision/{REST}", repo_info),
    ("GET HEAD", f"/{NAME}/resolve/{REST}/(.+)", resolve),
]
CONTROLS: list[tuple[str, str, Callable[..., Answer]]] = [
    ("POST", f"{CONTROL}faults", set_faults),
    ("GET", f"{CONTROL}state", tell_state),
]


# Outside a test's own process


def client_environment(endpoint: str, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    """For a process with the real client: it reads these once, at import. Xet would go past this server."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    return {
        **inherited,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **({"HF_TOKEN": token} if token else {}),
    }


class HubProcess:
    """A Hub in a process of its own, with the control endpoint; it ends with this process at the latest."""

    def __init__(self, folder: Path, *options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        port_file = folder / f"port-{uuid.uuid4().hex}"
        start = [sys.executable, "-m", "tests.support.hub_server", "--folder", str(folder), "--control"]
        with (folder / "hub.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*start, "--port-file", str(port_file), "--exit-with", str(os.getpid()), *options],
                cwd=Path(__file__).parents[2],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 30
        while not port_file.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the Hub did not start:\n{(folder / 'hub.log').read_text()}")
            time.sleep(0.01)
        self.endpoint = f"http://127.0.0.1:{port_file.read_text()}"

    def control(self, **wish: Any) -> None:
        """See set_faults."""
        self._ask("faults", json.dumps(wish).encode())

    def state(self) -> dict[str, Any]:
        return self._ask("state")

    def _ask(self, what: str, body: bytes | None = None) -> Any:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"{self.endpoint}{CONTROL}{what}", body, timeout=30) as answer:
            return json.load(answer)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where large objects are kept")
    parser.add_argument("--port-file", type=Path, required=True, help="written once the server listens")
    parser.add_argument("--token", action="append", help="a token that may write; without any, the tests' own")
    parser.add_argument("--read-token", action="append", default=[], help="a token that may only read")
    parser.add_argument("--control", action="store_true", help="faults and state over HTTP")
    parser.add_argument("--exit-with", type=int, metavar="PID", help="the parent process: end when it is gone")
    args = parser.parse_args()
    tokens = {**dict.fromkeys(args.read_token, "read"), **dict.fromkeys(args.token or [TOKEN], "write")}
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with Hub(args.folder, tokens, control=args.control) as hub:
        aside = args.port_file.with_name(f"{args.port_file.name}.writing")
        aside.write_text(str(hub.port))
        aside.replace(args.port_file)
        while not ended.wait(0.2) and args.exit_with in (None, os.getppid()):
            pass


if __name__ == "__main__":
    main()
