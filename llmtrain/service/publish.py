"""The branch that people see: the best checkpoint's weights, a model card, scores; renewed in one commit."""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.hf_api import RepoFile

from llmtrain import manifest, summary
from llmtrain.config import RunConfig
from llmtrain.errors import CheckpointError
from llmtrain.rundir import RunDir
from llmtrain.service import card, crash, plan
from llmtrain.service.plan import Shown
from llmtrain.service.remote import MAIN, Repo, git_hash, own_path, refuse_others

_CARD = "README.md"
_HUBS = ".gitattributes"


def publish(repo: Repo, config: RunConfig, run: RunDir) -> dict[str, Any]:
    """Make `main` show the proposed confirmed checkpoint, which is copied on the Hub: nothing is sent twice.
    Files of somebody else stay.

    What is to stand there is worked out from the ledgers at this moment, so that no repeated or late request can
    bring older weights back; `parent_commit` makes sure that nobody was there in between.

    Raises:
        Refused: the repository is another run's.
    """
    digest = plan.digest(run, repo.name)
    best = plan.to_show(run, repo.name)
    if best is None:
        return {"digest": digest, "message": "nothing to show yet"}
    step, commit = best.upload.step, best.upload.commit
    head = repo.refs()[0][MAIN]
    refuse_others(repo, run)
    shown, source = repo.tree(head), repo.tree(commit)
    wanted = {path: file for path, file in source.items() if not path.startswith("state/") and path != _HUBS}
    copies = [
        CommitOperationCopy(path, path, src_revision=commit)
        for path, file in wanted.items()
        if not _same(file, shown.get(path))
    ]
    additions = [CommitOperationAdd(path, content) for path, content in documents(repo, config, run, best).items()]
    added = {addition.path_in_repo for addition in additions}
    others = {*shown} - {*wanted, *added, _HUBS}
    deletions = [CommitOperationDelete(path) for path in sorted(others & _brought(repo, head, others))]
    if not deletions and {copy.path_in_repo for copy in copies} <= added and all(_stands(a, shown) for a in additions):
        return {"digest": digest, "message": f"{repo.name} shows step {step:,} already"}  # an answer was lost
    repo.api.create_commit(
        repo.name,
        [*[copy for copy in copies if copy.path_in_repo not in added], *additions, *deletions],
        commit_message=best.title(),
        revision=MAIN,
        parent_commit=head,
    )
    crash.point("after-publish")
    return {"digest": digest, "message": f"{repo.name} shows step {step:,}, {best.describe()}"}


def _brought(repo: Repo, head: str, others: set[str]) -> set[str]:
    """Of the files that are not to be shown, those that an earlier renewal has brought: the manifest that came with
    them lists them. Anything else is somebody's (a LICENSE), and stays."""
    ours = {path for path in others if path.startswith(own_path(""))}
    if ours == others:
        return ours
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = repo.api.hf_hub_download(repo.name, own_path(manifest.NAME), revision=head, local_dir=folder)
            described = manifest.read(Path(file).parent)
    except (RemoteEntryNotFoundError, CheckpointError):  # no renewal was here: nothing else is known to be ours
        return ours
    return ours | {name.removeprefix("model/") for name in described.files}


def _stands(addition: CommitOperationAdd, shown: dict[str, RepoFile]) -> bool:
    """Whether a file is on the Hub as it would be written."""
    remote = shown.get(addition.path_in_repo)
    if remote is None:
        return False
    with addition.as_file() as file:
        content = file.read()
    if remote.lfs:
        return remote.lfs.sha256 == hashlib.sha256(content).hexdigest()
    return remote.blob_id == git_hash(content)


def _same(one: RepoFile, other: RepoFile | None) -> bool:
    if other is None:
        return False
    return one.lfs.sha256 == other.lfs.sha256 if one.lfs and other.lfs else one.blob_id == other.blob_id


def documents(repo: Repo, config: RunConfig, run: RunDir, best: Shown) -> dict[str, bytes | str]:
    """What stands on `main` beside the weights."""
    picture = run.service / "curve.png"
    found: dict[str, bytes | str] = {
        _CARD: card.render(repo.name, config, run, best).encode(),
        own_path("config.yaml"): run.config.read_bytes(),
    }
    if run.scores.exists():
        found[own_path("scores.jsonl")] = run.scores.read_bytes()
    if summary.has_curve(run):
        summary.draw(run, picture)
        found[own_path(picture.name)] = picture.read_bytes()
    return found
