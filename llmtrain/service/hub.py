"""`python -m llmtrain.service.hub TASK RUN --repo USER/NAME`: one conversation with the Hub, in a process of its own.

Within the service only these processes import huggingface_hub and take its token. Every task first looks at what is
there, so that it can be repeated after a crash, and after an answer that never came:

    branch `checkpoints`    one commit of weights per checkpoint, tagged step-N, read back
    branch `main`           the best one, a model card, scores

The answer is one line of JSON on standard output: {"error": ..., "message": ...} or what came of it. The error `gone`
says that something is not there which the ledger speaks of: `check` finds out what.
"""

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RevisionNotFoundError
from huggingface_hub.utils._http import hf_request_event_hook  # what its own clients have, and no public name gives

from llmtrain import ledger, manifest, origin
from llmtrain.config import RunConfig, load_config
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.rundir import RunDir
from llmtrain.service import crash, plan
from llmtrain.service.publish import publish
from llmtrain.service.remote import (
    BRANCH,
    CHECKPOINT,
    MAIN,
    SAVED,
    LocalFile,
    Refused,
    Repo,
    brings_checkpoint,
    from_tags,
    leave_long_waits,
    local_files,
    marked,
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
_ABOUT_TOKENS = re.compile(r"token|permission|credential|authori[sz]|granted|\brights?\b", re.IGNORECASE)
"""Words of a 403 that is about who asks; a full storage is a 403 too."""
_ABOUT_SIZE = re.compile(
    r"storage|quota|too large|(?:size|exceed\w*|maximum)\b.*\blimit|limit\b.*\b(?:size|exceeded|reached)", re.I
)
"""Words of a 400, 402 or 403 that is about how much is sent, or lies there."""
_FULL_S = 3600.0
"""Until the next attempt at what has no room on the Hub: an attempt may send all bytes again."""
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
    set_client_factory(lambda: client(options.stall, leave_long_waits(options.stall)))
    run = RunDir(options.run.resolve())
    origin.enter(run)
    token = get_token() or ""
    answer = json.dumps(converse(options.task, run, options.repo, options.step, token))
    sys.stdout.write((answer.replace(token, "***") if token else answer) + "\n")
    sys.stdout.flush()


def client(stall_s: float, *looks: Callable[[httpx2.Response], None]) -> httpx2.Client:
    """Like the library's own, with time-outs: by default it waits for an answer for ever.

    Args:
        looks: called with each answer; may raise.
    """
    timeout = httpx2.Timeout(stall_s, connect=min(_CONNECT_S, stall_s))
    hooks = {"request": [hf_request_event_hook], "response": [*looks]}
    return httpx2.Client(event_hooks=hooks, follow_redirects=True, timeout=timeout)


def converse(task: str, run: RunDir, name: str, step: int, token: str) -> dict[str, Any]:
    """Do the task; every failure is an answer too."""
    try:
        config, _ = load_config(run.config)
        if not token:
            raise Refused(f"{name}: there is no token; {token_help()}")
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
        return explain(error, name) | _as_gone(task, error)
    except (ConfigError, HFValidationError, OfflineModeIsEnabled) as error:
        return {"error": "refused", "message": f"{name}: {error}"}
    except (httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error.__cause__, HfHubHTTPError):  # how the client reports a failed upload
            return explain(error.__cause__, name) | _as_gone(task, error.__cause__)
        return {"error": "failed", "message": f"{type(error).__name__}: {error}"}


def explain(error: HfHubHTTPError, name: str) -> dict[str, Any]:
    """Who has to act: a person (refused), or time."""
    status, words = error.response.status_code, error.server_message or ""
    if status == 413 or (status in (400, 402, 403) and _ABOUT_SIZE.search(words)):
        said = " ".join((words or error.response.reason_phrase).split())  # without one the client's has a URL in it
        return {
            "error": "refused",
            "message": f"{name}: the Hub refuses ({status}: {said}); checkpoints wait on this disk. Make room in that "
            "account, or send less (hub.optimizer_state=false), or name another repository (hub.repo). Tried again "
            "once an hour, and when a service is started",
            "retry_after_s": _FULL_S,
        }
    said = " ".join(str(error.server_message or error).split())
    if status in (401, 403, 404):
        about_token = status == 401 or (status == 403 and _ABOUT_TOKENS.search(said))
        advice = f"; {token_help()}" if about_token else ""
        return {"error": "refused", "message": f"{name}: the Hub refuses ({status}: {said}){advice}"}
    wait_s = retry_after_s(error)
    if status == 429 and (found := _IN_ABOUT.search(said)):
        wait_s = max(wait_s, float(found[1]) * _UNIT_S[found[2]])
    return {"error": "failed", "message": f"the Hub answered {status}: {said}", "retry_after_s": wait_s}


def token_help() -> str:
    """Where the token in use comes from decides what would help: the environment goes before a login."""
    name = next((name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)), None)
    if name is None:
        return (
            "set HF_TOKEN, or run 'hf auth login', with a token that may write to it (a running service sees a changed "
            "HF_TOKEN when it is started again)"
        )
    return (
        f"the token in use is that of {name} in the environment, which goes before that of 'hf auth login': set it to "
        f"a token that may write to it, or unset it to use the login; then start a running service again, which keeps "
        "the old one"
    )


def _as_gone(task: str, error: HfHubHTTPError) -> dict[str, Any]:
    """After `check` everything was there; what a 404 means then is for another check to find out."""
    return {"error": "gone"} if task != "check" and error.response.status_code == 404 else {}


def check(repo: Repo, config: RunConfig, run: RunDir) -> dict[str, Any]:
    """Make the repository if need be; find out whether it may be written to, whose it is, and what it has lost.

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
    message = f"{repo.name} ({visibility}) takes the checkpoints of this run"
    return {"message": message, "private": private, **find_lost(repo, config, run)}


def find_lost(repo: Repo, config: RunConfig, run: RunDir) -> dict[str, Any]:
    """What the ledger says to be on the Hub, compared with the tags that are there, in one request.

    `gone`: steps to upload again, or lost. Those whose tag says to be the same checkpoint at another commit (a history
    that was rewritten) are `moved`, or `to_read`: one that lies on this disk is read back again before it counts.
    """
    there, here = repo.refs()[1], manifest.identities(run)
    doomed = plan.untaggable(run, config.model_copy(update={"hub": config.hub.model_copy(update={"repo": repo.name})}))
    gone: list[int] = []
    to_read: list[int] = []
    moved: list[tuple[int, str]] = []
    for step, upload in ledger.uploads(run).items():
        if upload.repo != repo.name or upload.removed or there.get(upload.tag) == upload.commit:
            continue
        if here.get(step, upload.checkpoint) != upload.checkpoint:  # saved again since: that one waits
            continue
        if upload.tag not in there:
            if step not in doomed:  # else it was taken away by us, which could not be recorded any more
                gone.append(step)
        elif marked(dict(repo.commits(upload.tag)).get(there[upload.tag], ""), CHECKPOINT) != upload.checkpoint:
            gone.append(step)
        elif step in here:
            to_read.append(step)
        else:
            moved.append((step, there[upload.tag]))
    return {"gone": gone, "to_read": to_read, "moved": moved}


def refuse_strange_files(repo: Repo) -> None:
    """`main` is made to show a run's checkpoint, so it must be a run's, or empty, to begin with.

    Raises:
        Refused: no run has begun this repository, and somebody's files are there.
    """
    if any(any(brings_checkpoint(message) for _, message in find(repo)) for find in (Repo.commits, from_tags)):
        return
    head = repo.refs()[0].get(MAIN)
    strange = [] if head is None else sorted(set(repo.tree(head)) - {".gitattributes", "README.md"})
    if strange:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        raise Refused(
            f"{repo.name} holds files that no run of llmtrain has brought ({', '.join(strange[:3])}{more}), which "
            "renewing main would mix with its own; name an empty or a new repository (hub.repo)"
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
    if repo.find(identity, wanted) is None:
        refuse_secrets([*own_files(run), *(file.path for file in wanted.values())], token)
    saved = f"{SAVED}{(run.checkpoint(step) / manifest.NAME).stat().st_mtime:.3f}"
    description = f"{marker(identity)}\n{run_marker(origin.read(run).id)}\n{saved}"
    commit = patient(
        lambda: repo.find(identity, wanted) or commit_files(repo, run, wanted, f"step {step}", description)
    )
    crash.point("after-commit")
    if wrong := repo.differences(wanted, commit):
        manifest.verify(run.checkpoint(step))  # it may be this side that has changed
        raise OSError(f"read back from {repo.name} at {commit[:10]}, {wrong[0]} is not what was sent")
    tag = tag_of(step)
    repo.set_tag(tag, commit)
    crash.point("after-tag")
    size = sum(file.size_bytes for file in wanted.values())
    record = {"checkpoint": identity, "commit": commit, "tag": tag, "size_bytes": size}
    return {"upload": record | {"with_state": config.hub.optimizer_state}}


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
