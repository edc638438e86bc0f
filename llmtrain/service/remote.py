"""A repository on the Hub as this project uses it: looking, comparing, confirming."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.hf_api import GitCommitInfo, RepoFile
from huggingface_hub.utils import hf_raise_for_status, parse_ratelimit_headers

from llmtrain import access_tokens, files, manifest, origin
from llmtrain.rundir import RunDir

BRANCH, MAIN = "checkpoints", "main"
CHECKPOINT, RUN, SAVED = "checkpoint: ", "run: ", "saved: "
"""Marks in commits' messages: lines that begin so."""
_TAG = re.compile(r"step-(\d+)")
_OWN = "llmtrain"
"""Folder for what is ours and not the model's."""
_TEXT_BYTES = 4 << 20
_PAUSES_S = (0.5, 1.0, 2.0, 4.0)
_SHORT_WAIT_S = 30
Result = TypeVar("Result")


class Refused(Exception):
    """A person has to mend something."""


class LongWait(HfHubHTTPError):
    """The Hub asks for more time than a process may sleep: the service waits, and shows that it does."""


@dataclass(frozen=True)
class LocalFile:
    """A file to upload, and what it has to be."""

    path: Path
    size_bytes: int
    sha256: str

    def is_at(self, remote: RepoFile | None) -> bool:
        """Whether the Hub holds the same bytes, by its own hash."""
        if remote is None or remote.size != self.size_bytes:
            return False
        if remote.lfs:
            return remote.lfs.sha256 == self.sha256
        content = self.path.read_bytes()
        return hashlib.sha256(content).hexdigest() == self.sha256 and remote.blob_id == git_hash(content)


def git_hash(content: bytes) -> str:
    """As git, and so the Hub, names a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def local_files(run: RunDir, step: int, described: manifest.Manifest, with_state: bool) -> dict[str, LocalFile]:
    """What is uploaded of a checkpoint, by path in the repository: the model at its root."""
    folder = run.checkpoint(step)
    found: dict[str, LocalFile] = {}
    for name, info in described.files.items():
        if name.startswith("model/"):
            found[name.removeprefix("model/")] = LocalFile(folder / name, info.size_bytes, info.sha256)
        elif with_state:
            found[name] = LocalFile(folder / name, info.size_bytes, info.sha256)
    own = folder / manifest.NAME
    found[f"{_OWN}/{manifest.NAME}"] = LocalFile(own, own.stat().st_size, files.sha256(own))
    return found


def own_path(name: str) -> str:
    return f"{_OWN}/{name}"


def own_files(run: RunDir) -> list[Path]:
    """What goes with every checkpoint: the configuration, and of an adapter what its base was."""
    return [path for path in (run.config, run.base) if path.exists()]


def secrets_in(paths: list[Path], token: str) -> list[Path]:
    """Text files in which something like an access token stands."""
    found: list[Path] = []
    for path in paths:
        if path.suffix in (".safetensors", ".png") or path.stat().st_size > _TEXT_BYTES:
            continue
        content = path.read_bytes()
        if access_tokens.found_in(content.decode(errors="replace")) or token.encode() in content:
            found.append(path)
    return found


def patient(call: Callable[[], Result]) -> Result:
    """The call's result; repeated with growing pauses where time may help, as the client does for some calls only.

    `call` must look before it acts: an attempt whose answer was lost may have been carried out.
    """
    for pause_s in _PAUSES_S:
        try:
            return call()
        except (httpx2.HTTPError, HfHubHTTPError, RuntimeError, json.JSONDecodeError) as error:
            if not is_passing(error):
                raise
            time.sleep(max(pause_s, retry_after_s(error)))
    return call()


def retry_after_s(error: Exception) -> float:
    """How long the Hub asks to wait; 0 where it does not say."""
    return asked_wait_s(error.response) if isinstance(error, HfHubHTTPError) else 0.0


def asked_wait_s(response: httpx2.Response) -> float:
    """What an answer says of that, in the two headers that the client heeds."""
    limit = parse_ratelimit_headers(response.headers) if response.status_code == 429 else None
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    header = response.headers.get("Retry-After", "").strip()
    return float(header) if header.isdigit() else 0.0


def leave_long_waits(stall_s: float) -> Callable[[httpx2.Response], None]:
    """For the client of a process that is ended when it makes no progress for so long: a look at each answer, which
    raises LongWait where the client, or `patient`, would sleep for as long as the Hub asks."""
    longest_s = min(_SHORT_WAIT_S, stall_s / 2)

    def look(response: httpx2.Response) -> None:
        if response.is_error and asked_wait_s(response) > longest_s:
            response.read()
            try:
                hf_raise_for_status(response)
            except HfHubHTTPError as error:
                raise LongWait(str(error), response=response, server_message=error.server_message) from error

    return look


def is_passing(error: Exception) -> bool:
    """Whether the same request may well succeed in a moment."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # how the client reports a failed upload
        return isinstance(error.__cause__, Exception) and is_passing(error.__cause__)
    if not isinstance(error, HfHubHTTPError):
        return True
    status, wait_s = error.response.status_code, retry_after_s(error)
    if isinstance(error, LongWait) or wait_s > _SHORT_WAIT_S:
        return False
    return status >= 500 or status == 412 or (status == 429 and wait_s > 0)


class Repo:
    """Everything is asked anew at each call: another process may have been here."""

    def __init__(self, api: HfApi, name: str):
        self.api, self.name = api, name

    def refs(self) -> tuple[dict[str, str], dict[str, str]]:
        """Branches and tags, each with its commit."""
        refs = patient(lambda: self.api.list_repo_refs(self.name))
        return {b.name: b.target_commit for b in refs.branches}, {t.name: t.target_commit for t in refs.tags}

    def tree(self, revision: str) -> dict[str, RepoFile]:
        """Files at a revision, by path."""
        entries = patient(lambda: list(self.api.list_repo_tree(self.name, recursive=True, revision=revision)))
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def history(self, revision: str = BRANCH) -> list[GitCommitInfo]:
        """The commits of a branch, or those that led to a tag, newest first."""
        try:
            return patient(lambda: self.api.list_repo_commits(self.name, revision=revision))
        except RevisionNotFoundError:
            return []

    def commits(self, revision: str = BRANCH) -> list[tuple[str, str]]:
        """(commit, message) of the checkpoints' branch, newest first."""
        return [(commit.commit_id, message_of(commit)) for commit in self.history(revision)]

    def tagged(self) -> dict[int, str]:
        """The commit of each step that has a tag."""
        return {step: commit for tag, commit in self.refs()[1].items() if (step := step_of(tag)) is not None}

    def behind(self, commits: Iterable[str], known: Iterable[GitCommitInfo] = ()) -> dict[str, GitCommitInfo]:
        """These commits and what led to them, beside those known already: where the branch was squashed or deleted
        nothing else tells what the tags hold. One request where they lie upon one another, the last of them first."""
        found = {commit.commit_id: commit for commit in known}
        for commit in commits:
            if commit not in found:
                found |= {one.commit_id: one for one in self.history(commit) if one.commit_id not in found}
        return found

    def find(self, identity: str, paths: Collection[str]) -> str | None:
        """The commit of a checkpoint, by the marker in its description. One without all of these paths does not count:
        hub.optimizer_state may have been turned on since."""
        found = (commit for commit, message in self.commits() if marker(identity) in message)
        return next((commit for commit in found if self.tree(commit).keys() >= {*paths}), None)

    def set_tag(self, tag: str, commit: str) -> None:
        """Point a tag at a commit, and read it back: the client takes an existing one for done."""

        def move() -> None:
            tags = self.refs()[1]
            if tags.get(tag) == commit:
                return
            if tag in tags:
                self.api.delete_tag(self.name, tag=tag)
            self.api.create_tag(self.name, tag=tag, revision=commit, exist_ok=True)

        patient(move)
        if self.refs()[1].get(tag) != commit:
            raise OSError(f"tag {tag} does not point at {commit[:10]} after it was made")

    def differences(self, wanted: dict[str, LocalFile], revision: str) -> list[str]:
        """Paths that the Hub does not hold as they should be."""
        tree = self.tree(revision)
        return [path for path, file in wanted.items() if not file.is_at(tree.get(path))]


def message_of(commit: GitCommitInfo) -> str:
    return f"{commit.title}\n{commit.message}"


def marker(identity: str) -> str:
    """Line in a commit's description that finds a checkpoint again."""
    return f"{CHECKPOINT}{identity}"


def run_marker(run_id: str) -> str:
    """Line in a commit's description that binds a repository to a run."""
    return f"{RUN}{run_id}"


def tag_of(step: int) -> str:
    return f"step-{step}"


def step_of(tag: str) -> int | None:
    """The step of a checkpoint's tag; None of any other tag."""
    found = _TAG.fullmatch(tag)
    return None if found is None else int(found[1])


def owner(commits: Sequence[tuple[str, str]]) -> str | None:
    """The run whose checkpoint came first, of commits from newest to oldest; None where nobody's has come.

    Two runs may both have found the repository empty: which of them it belongs to is then the Hub's own order.
    """
    ours = (message for _, message in reversed(commits) if brings_checkpoint(message))
    return next((run for message in ours if (run := marked(message, RUN)) is not None), None)


def brings_checkpoint(message: str) -> bool:
    """Whether a commit is a run's: "run: " alone may stand in anybody's."""
    return marked(message, CHECKPOINT) is not None


def marked(message: str, mark: str) -> str | None:
    """What follows a mark in a commit's message: a checkpoint's identity, a run's."""
    return next((line.removeprefix(mark) for line in message.splitlines() if line.startswith(mark)), None)


def owner_of(repo: Repo) -> str | None:
    """`owner`, by the branch; where that has no checkpoint (it is new, squashed or deleted), by what the tags hold."""
    return owner(repo.commits()) or owner(from_tags(repo))


def from_tags(repo: Repo) -> list[tuple[str, str]]:
    """(commit, message) of what the tags step-N hold and what led there, newest first."""
    behind = repo.behind(commit for _, commit in sorted(repo.tagged().items(), reverse=True))
    ordered = sorted(behind.values(), key=lambda commit: commit.created_at, reverse=True)
    return [(commit.commit_id, message_of(commit)) for commit in ordered]


def refuse_others(repo: Repo, run: RunDir) -> None:
    """Called between reading a branch's head and committing upon it: who commits in between moves the head.

    Raises:
        Refused: the repository belongs to another run.
    """
    if owner_of(repo) not in (None, origin.read(run).id):
        raise Refused(f"{repo.name} holds the checkpoints of another run; name another repository (hub.repo)")
