"""`python -m llmtrain.service.hub TASK RUN --repo USER/NAME`: one conversation with the Hub, in a process of its own.

Within the service only these processes import huggingface_hub and take its token. Every task first looks at what is
there, so that it can be repeated after a crash, and after an answer that never came:

    branch `checkpoints`    one commit of weights per checkpoint, tagged step-N, read back
    branch `main`           the best one, a model card, scores

The answer is one line of JSON on standard output: {"error": ..., "message": ...} or what came of it.
"""

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RevisionNotFoundError
from huggingface_hub.utils._http import hf_request_event_hook  # what its own clients have, and no public name gives

from llmtrain import manifest, origin
from llmtrain.config import RunConfig, load_config
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.rundir import RunDir
from llmtrain.service import crash
from llmtrain.service.publish import publish
from llmtrain.service.remote import (
    BRANCH,
    MAIN,
    LocalFile,
    Refused,
    Repo,
    brings_checkpoint,
    local_files,
    marker,
    own_files,
    own_path,
    patient,
    refuse_others,
    retry_after_s,
    run_marker,
    secrets_in,
    tag_of,
)

_CONNECT_S = 30.0
_TOKEN_HELP = "set HF_TOKEN, or run 'hf auth login', with a token that may write to it"
_IN_ABOUT = re.compile(r"in (?:about )?(\d+) (second|minute|hour)")
_UNIT_S = {"second": 1.0, "minute": 60.0, "hour": 3600.0}


class Altered(Exception):
    """A file is not what the checkpoint's manifest says."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m llmtrain.service.hub", description=__doc__)
    parser.add_argument("task", choices=["check", "upload", "publish", "untag"])
    parser.add_argument("run", type=Path)
    parser.add_argument("--repo", required=True)
    parser.add_argument("--step", type=int, default=0)
    parser.add_argument("--stall", type=float, default=300.0, help="longest wait for an answer, in s")
    options = parser.parse_args(arguments)
    set_client_factory(lambda: client(options.stall))
    run = RunDir(options.run.resolve())
    origin.enter(run)
    token = get_token() or ""
    answer = json.dumps(converse(options.task, run, options.repo, options.step, token))
    sys.stdout.write((answer.replace(token, "***") if token else answer) + "\n")
    sys.stdout.flush()


def client(stall_s: float) -> httpx2.Client:
    """Like the library's own, with time-outs: by default it waits for an answer for ever."""
    timeout = httpx2.Timeout(stall_s, connect=min(_CONNECT_S, stall_s))
    return httpx2.Client(event_hooks={"request": [hf_request_event_hook]}, follow_redirects=True, timeout=timeout)


def converse(task: str, run: RunDir, name: str, step: int, token: str) -> dict[str, Any]:
    """Do the task; every failure is an answer too."""
    try:
        config, _ = load_config(run.config)
        if not token:
            raise Refused(f"{name}: there is no token; {_TOKEN_HELP}")
        repo = Repo(HfApi(token=token), name)
        match task:
            case "check":
                return check(repo, config, run)
            case "upload":
                return upload(repo, config, run, step, token)
            case "publish":
                refuse_secrets([run.config], token)
                return patient(lambda: publish(repo, config, run))
            case _:
                return untag(repo, run, step)
    except Refused as error:
        return {"error": "refused", "message": str(error)}
    except (Altered, CheckpointError) as error:
        return {"error": "altered", "message": str(error)}
    except HfHubHTTPError as error:
        return explain(error, name)
    except (ConfigError, HFValidationError, OfflineModeIsEnabled) as error:
        return {"error": "refused", "message": f"{name}: {error}"}
    except (httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error.__cause__, HfHubHTTPError):  # how the client reports a failed upload
            return explain(error.__cause__, name)
        return {"error": "failed", "message": f"{type(error).__name__}: {error}"}


def explain(error: HfHubHTTPError, name: str) -> dict[str, Any]:
    """Who has to act: a person (refused), or time."""
    status = error.response.status_code
    said = " ".join(str(error.server_message or error).split())
    if status in (401, 403, 404):
        return {"error": "refused", "message": f"{name}: the Hub refuses ({status}: {said}); {_TOKEN_HELP}"}
    wait_s = retry_after_s(error)
    if status == 429 and (found := _IN_ABOUT.search(said)):
        wait_s = max(wait_s, float(found[1]) * _UNIT_S[found[2]])
    return {"error": "failed", "message": f"the Hub answered {status}: {said}", "retry_after_s": wait_s}


def check(repo: Repo, config: RunConfig, run: RunDir) -> dict[str, Any]:
    """Make the repository if need be; find out whether it may be written to, and whose it is.

    Raises:
        Refused: it is public though it should be private, or holds the checkpoints of another run, or other files.
    """
    patient(lambda: repo.api.create_repo(repo.name, private=config.hub.private, exist_ok=True))
    private = bool(patient(lambda: repo.api.model_info(repo.name)).private)
    if config.hub.private and not private:
        raise Refused(f"{repo.name} is public although hub.private=true: make it private in its settings on the Hub")
    refuse_others(repo, run)
    refuse_strange_files(repo)  # before anything is written there
    patient(lambda: _make_branch(repo))  # needs the right to write
    visibility = "private" if private else "public"
    return {"message": f"{repo.name} ({visibility}) takes the checkpoints of this run", "private": private}


def refuse_strange_files(repo: Repo) -> None:
    """`main` is made to hold what a run shows and nothing else, so it must be a run's, or empty, to begin with.

    Raises:
        Refused: no run has begun this repository, and somebody's files are there.
    """
    if any(brings_checkpoint(message) for _, message in repo.commits()):
        return
    head = repo.refs()[0].get(MAIN)
    strange = [] if head is None else sorted(set(repo.tree(head)) - {".gitattributes", "README.md"})
    if strange:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        raise Refused(
            f"{repo.name} holds files that no run of llmtrain has brought ({', '.join(strange[:3])}{more}), which "
            "renewing main would delete; name an empty or a new repository (hub.repo)"
        )


def _make_branch(repo: Repo) -> None:
    """Without the client's exist_ok: it takes "you may not write" for done where the branch is there already."""
    try:
        repo.api.create_branch(repo.name, branch=BRANCH)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise


def upload(repo: Repo, config: RunConfig, run: RunDir, step: int, token: str) -> dict[str, Any]:
    """Bytes, one commit, reading it back, a tag. What an earlier attempt has done is found and kept.

    Raises:
        Altered: a file does not match the manifest; nothing is committed.
        Refused: the repository is another run's, or an access token would be uploaded.
    """
    refuse_others(repo, run)  # also before bytes are sent
    described = manifest.read(run.checkpoint(step))
    identity = manifest.identity(described)
    wanted = local_files(run, step, described, config.hub.optimizer_state)
    if repo.find(identity) is None:
        refuse_secrets([*own_files(run), *(file.path for file in wanted.values())], token)
    description = f"{marker(identity)}\n{run_marker(origin.read(run).id)}"
    commit = patient(lambda: repo.find(identity) or commit_files(repo, run, wanted, f"step {step}", description))
    crash.point("after-commit")
    if wrong := repo.differences(wanted, commit):
        manifest.verify(run.checkpoint(step))  # it may be this side that has changed
        raise OSError(f"read back from {repo.name} at {commit[:10]}, {wrong[0]} is not what was sent")
    tag = tag_of(step)
    repo.set_tag(tag, commit)
    crash.point("after-tag")
    size = sum(file.size_bytes for file in wanted.values())
    return {"upload": {"checkpoint": identity, "commit": commit, "tag": tag, "size_bytes": size}}


def refuse_secrets(paths: list[Path], token: str) -> None:
    if leaks := secrets_in(paths, token):
        raise Refused(f"something like an access token stands in {leaks[0]}: not uploaded; take it out")


def commit_files(repo: Repo, run: RunDir, wanted: dict[str, LocalFile], title: str, description: str) -> str:
    """Send the bytes that the Hub has not, then one commit that makes the branch hold these files and no others.

    Raises:
        Altered: a file does not match the manifest.
        Refused: another run has begun this repository meanwhile.
    """
    additions = [CommitOperationAdd(path, str(file.path)) for path, file in wanted.items()]
    for addition in additions:
        file = wanted[addition.path_in_repo]
        if addition.upload_info.sha256.hex() != file.sha256:  # reads the file
            raise Altered(f"{file.path}: altered: its SHA-256 is not the manifest's")
    beside = {own_path(path.name): path for path in own_files(run)}
    additions += [CommitOperationAdd(path, str(file)) for path, file in beside.items()]
    patient(lambda: repo.api.preupload_lfs_files(repo.name, additions, revision=BRANCH))
    crash.point("after-bytes")
    head = repo.refs()[0][BRANCH]
    refuse_others(repo, run)
    kept = {*wanted, *beside, ".gitattributes"}
    deletions = [CommitOperationDelete(path) for path in repo.tree(head) if path not in kept]
    return repo.api.create_commit(
        repo.name,
        [*additions, *deletions],
        commit_message=title,
        commit_description=description,
        revision=BRANCH,
        parent_commit=head,  # nobody has been here since we looked
    ).oid


def untag(repo: Repo, run: RunDir, step: int) -> dict[str, Any]:
    """Remove a checkpoint's tag; fine if it is gone already."""
    refuse_others(repo, run)
    with contextlib.suppress(RevisionNotFoundError):  # an earlier attempt, whose answer was lost
        patient(lambda: repo.api.delete_tag(repo.name, tag=tag_of(step)))
    return {}


if __name__ == "__main__":
    main()
