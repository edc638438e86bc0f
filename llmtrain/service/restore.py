"""`llmtrain restore`: a run folder from what the run's repository on the Hub holds, to resume training.

Only what was uploaded is restored: a checkpoint with its optimizer state (hub.optimizer_state=true), the
configuration, the identity that binds the repository to the run, and what the service knew of the other checkpoints:
their scores and uploads, without which `main` would show the restored one as the best there is. The ledgers of training
and TensorBoard start empty.
"""

import argparse
import contextlib
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, get_token, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.hf_api import GitCommitInfo

from llmtrain import files, jsonl, ledger, locks, log, manifest
from llmtrain.config import load_config, resolved_yaml
from llmtrain.config.schema import RunSection
from llmtrain.errors import (
    EXIT_INTERRUPTED,
    CheckpointError,
    ConfigError,
    HubError,
    RunFolderError,
    disk_errors,
    exit_with_code,
)
from llmtrain.ledger import Score, Upload
from llmtrain.manifest import Manifest
from llmtrain.origin import Origin
from llmtrain.rundir import RunDir
from llmtrain.service.hub import client, explain
from llmtrain.service.remote import (
    CHECKPOINT,
    MAIN,
    RUN,
    SAVED,
    Repo,
    marked,
    message_of,
    own_path,
    owner_of,
    step_of,
    tag_of,
)

_STALL_S = 300.0
_FROM = "from"
"""Holds the commit that is being restored."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="llmtrain restore", description=__doc__)
    parser.add_argument("repo")
    parser.add_argument("run", type=Path)
    parser.add_argument("--step", type=int)
    options = parser.parse_args(arguments)
    log.set_up(0)
    set_client_factory(lambda: client(_STALL_S))
    with exit_with_code():
        try:
            restore(Repo(HfApi(token=get_token() or False), options.repo), RunDir(options.run), options.step)
        except KeyboardInterrupt:
            log.info("stopped; what was received is kept: the same command goes on from there")
            sys.exit(EXIT_INTERRUPTED)


def restore(repo: Repo, run: RunDir, step: int | None) -> None:
    """Download, verify every byte, and only then let the run folder appear. Run again, it resumes.

    Raises:
        HubError: the Hub refuses, or cannot be reached.
        CheckpointError: that step is not there, is not what its manifest says, or has no optimizer state.
        RunFolderError: the folder is in use, or another process restores to it.
    """
    _refuse_what_is_there(run)
    try:
        RunSection(name=run.path.name)
    except ValueError:
        raise ConfigError([f"{run.path.name} cannot be the name of a run: letters, digits, '.', '_' and '-'"]) from None
    aside = RunDir(run.path.with_name(f".restoring-{run.path.name}"))
    kept = f"what was received is kept in {aside.path}"
    with disk_errors("restore", run.path.parent, then=kept), contextlib.ExitStack() as held:
        try:
            tag, commit, run_id = find(repo, step)
            log.info(f"{repo.name}: {tag} ({commit[:10]})")
            received, main_branch = aside.path / "received", aside.path / "main"
            held.enter_context(_alone(aside, run))
            _begin(aside, commit)
            described = look(repo, commit, received)
            if described.train_state.step != step_of(tag):
                raise CheckpointError(f"{repo.name}: {tag} holds step {described.train_state.step}")
            wanted = [*map(_on_the_hub, described.files), own_path("*")]  # not whatever else may lie there
            repo.api.snapshot_download(repo.name, revision=commit, local_dir=received, allow_patterns=wanted)
            recall(repo, run_id, main_branch, aside)
        except HfHubHTTPError as error:
            raise HubError(explain(error, repo.name)["message"]) from None
        except (httpx2.HTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            raise HubError(f"{repo.name}: {type(error).__name__}: {error}; try again") from None
        _configure(received, aside, run, repo.name)
        arrange(received, described, aside)
        files.write_atomic(aside.origin, Origin(id=run_id, folder=Path.cwd()).model_dump_json() + "\n")
        for downloaded in (received, main_branch):
            shutil.rmtree(downloaded, ignore_errors=True)
        (aside.path / _FROM).unlink()
        aside.path.rename(run.path)
    command = f"python -m llmtrain {shlex.quote(str(run.config))}"
    log.info(f"{run.path}: step {step_of(tag)} verified; go on: {command}")


def _refuse_what_is_there(run: RunDir) -> None:
    if run.path.exists():
        raise RunFolderError(f"{run.path} is there already; give the restored run a folder of its own")


@contextlib.contextmanager
def _alone(aside: RunDir, run: RunDir) -> Iterator[None]:
    """Two that write to one folder would each delete what the other has received."""
    path = aside.path.with_name(f"{aside.path.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = locks.hold(path, f"nobody else restores to {run.path}")
    if lock is None:
        with contextlib.suppress(OSError):
            raise RunFolderError(
                f"{run.path}: another restore ({path.read_text()}) is at work on it; wait for it, or stop it"
            )
        raise RunFolderError(f"{run.path}: another restore is at work on it; wait for it, or stop it")
    with lock:
        _refuse_what_is_there(run)  # by another one, meanwhile
        yield
        path.unlink(missing_ok=True)


def _begin(aside: RunDir, commit: str) -> None:
    """An attempt that was cut short goes on; of another commit, or another repository, nothing may stay."""
    mark = aside.path / _FROM
    if aside.path.exists() and not (mark.is_file() and mark.read_text() == commit):
        shutil.rmtree(aside.path)
    aside.path.mkdir(parents=True, exist_ok=True)
    mark.write_text(commit)


def find(repo: Repo, step: int | None) -> tuple[str, str, str]:
    """Tag, commit, and the identity of the run whose checkpoint it is: of this step, or of the newest.

    The newest is the one that was saved last: after `restore --step` an abandoned life's higher steps are there too.
    """
    tags = repo.tagged()
    if not tags:
        raise CheckpointError(f"{repo.name} holds no checkpoint of a run (no tag step-N)")
    if step is not None and step not in tags:
        there = ", ".join(str(number) for number in sorted(tags))
        raise CheckpointError(f"{repo.name} holds no step {step}; there are: {there}")
    made = _made(repo, tags)
    ours = {number: run_id for number, commit in made.items() if (run_id := marked(message_of(commit), RUN))}
    if not ours or (step is not None and step not in ours):
        which = "any tag step-N" if step is None else tag_of(step)
        raise CheckpointError(f"{repo.name}: the commit of {which} is not one of a run of ours")
    wanted = max(ours, key=lambda number: (_saved(made[number]), number)) if step is None else step
    if step is None and (higher := max(ours)) > wanted:
        log.warning(f"{repo.name}: step {wanted} was saved last; step {higher} before it (--step {higher} takes that)")
    return tag_of(wanted), tags[wanted], ours[wanted]


def _made(repo: Repo, tags: dict[int, str]) -> dict[int, GitCommitInfo]:
    """The commits that the tags show: from the branch, or where that was squashed from what led to the tags."""
    newest_first = [commit for _, commit in sorted(tags.items(), reverse=True)]
    behind = repo.behind(newest_first, repo.history())
    return {step: behind[commit] for step, commit in tags.items() if commit in behind}


def _saved(commit: GitCommitInfo) -> float:
    """When the checkpoint was saved. An upload may be late (a failed one is tried again after the next), so the time
    of the commit counts only where nothing else is known."""
    try:
        return float(marked(message_of(commit), SAVED) or "")
    except ValueError:
        return commit.created_at.timestamp()


def look(repo: Repo, commit: str, received: Path) -> Manifest:
    """The manifest, before gigabytes are downloaded for nothing.

    Raises:
        CheckpointError: it is missing, altered or names files elsewhere, or the optimizer state was not uploaded.
    """
    there = repo.tree(commit)
    if own_path(manifest.NAME) not in there:
        raise CheckpointError(f"{repo.name}: there is no {own_path(manifest.NAME)} in {commit[:10]}")
    repo.api.hf_hub_download(repo.name, own_path(manifest.NAME), revision=commit, local_dir=received)
    described = manifest.read(received / own_path(""))
    state = [name for name in described.files if name.startswith("state/")]
    if state and not any(name in there for name in state):
        raise CheckpointError(
            f"step {described.train_state.step} has no optimizer state on the Hub (hub.optimizer_state=false), so "
            "training cannot go on with it; the model alone loads with from_pretrained(REPO, revision=...)"
        )
    if lost := [name for name in described.files if _on_the_hub(name) not in there]:
        more = f", nor are {len(lost) - 1} more" if len(lost) > 1 else ""
        raise CheckpointError(f"{repo.name}: {lost[0]} is not in {commit[:10]} (any more){more}")
    return described


def recall(repo: Repo, run_id: str, folder: Path, run: RunDir) -> None:
    """The service's ledgers, as far as the Hub knows what stood in them: scores as `main` shows them, and uploads.

    Args:
        folder: for what is downloaded.
    """
    shutil.rmtree(run.service, ignore_errors=True)  # of an attempt that was killed here
    run.service.mkdir(parents=True)
    for upload in uploads(repo, run_id):
        ledger.append(run.uploads, upload)
    head = repo.refs()[0].get(MAIN)
    name = own_path(run.scores.name)
    if head is None or owner_of(repo) != run_id or name not in repo.tree(head):
        return  # `main` was never renewed, or it is another run's
    path = Path(repo.api.hf_hub_download(repo.name, name, revision=head, local_dir=folder))
    try:
        for record in jsonl.read(path):
            Score.model_validate(record)
    except (ValueError, RunFolderError):
        log.warning(f"{repo.name}: {name} on {MAIN} cannot be read: the checkpoints' scores do not come back")
    else:
        path.rename(run.scores)


def uploads(repo: Repo, run_id: str) -> list[Upload]:
    """The run's tagged checkpoints, oldest first, as they were recorded; without sizes, which take a request each.

    Those whose tags were removed are left out: nothing that is on no disk asks for them.
    """
    found: list[Upload] = []
    for step, commit in sorted(_made(repo, repo.tagged()).items()):
        message, time = message_of(commit), commit.created_at.timestamp()
        identity = marked(message, CHECKPOINT)
        if marked(message, RUN) == run_id and identity is not None:
            oid, tag = commit.commit_id, tag_of(step)
            found.append(Upload(step=step, checkpoint=identity, repo=repo.name, commit=oid, tag=tag, time=time))
    return found


def arrange(received: Path, described: Manifest, run: RunDir) -> None:
    """Make a checkpoint of the files as the Hub has them: the model at the root, what is ours below llmtrain/."""
    shutil.rmtree(run.checkpoints, ignore_errors=True)  # of an attempt that was killed here
    folder = run.checkpoint(described.train_state.step)
    for name in [*described.files, manifest.NAME]:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        (received / _on_the_hub(name)).rename(place)
    manifest.verify(folder)


def _configure(received: Path, aside: RunDir, run: RunDir, repo: str) -> None:
    """The configuration, under the run's new name and with the repository that it came from: that may have got another
    name since, or stood on a command line alone. It may not allow a base to run code of its own."""
    config, _ = load_config(received / own_path(aside.config.name))
    if config.model.kind == "qlora" and config.model.trust_remote_code:
        log.warning(
            f"{repo}: trained with model.trust_remote_code=true, which is off here: code of the base "
            f"{config.model.base} would run. If you trust its authors, go on with model.trust_remote_code=true"
        )
        config = config.model_copy(update={"model": config.model.model_copy(update={"trust_remote_code": False})})
    named = config.run.model_copy(update={"dir": str(run.path.parent), "name": run.path.name})
    hub = config.hub.model_copy(update={"repo": repo})
    files.write_atomic(aside.config, resolved_yaml(config.model_copy(update={"run": named, "hub": hub})))
    base = received / own_path(aside.base.name)
    if base.exists():
        base.rename(aside.base)


def _on_the_hub(name: str) -> str:
    return own_path(name) if name == manifest.NAME else name.removeprefix("model/")


if __name__ == "__main__":
    main()
