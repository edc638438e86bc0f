"""Which checkpoints stay, and deleting the others: in one rename each, so that none is ever half there.

The checkpoint service deletes, and nobody else; without one (service.start=never) training does.
"""

import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from llmtrain import jsonl, ledger, manifest, rundir
from llmtrain.config.schema import CheckpointSection, RunConfig
from llmtrain.rundir import RunDir

UNSCORED, UNCONFIRMED = "not scored yet", "not confirmed on the Hub yet"
"""Why a checkpoint stays for now that the rule would delete."""


@dataclass(frozen=True)
class Held:
    """What lies on the disk beyond the rule of `checkpoint`, and goes in time."""

    why: str
    """E.g. "of the checkpoints there 6 wait to be scored"; empty: there is nothing."""
    wait_s: float
    """How long waiting for that makes sense; 0: nobody is at work on it."""


def nothing_held() -> Held:
    return Held("", 0.0)


def to_keep(steps: Collection[int], losses: Mapping[int, float], rule: CheckpointSection) -> set[int]:
    """The steps that the rule keeps: the last, the best on held-out data, and every n-th."""
    scored = sorted((step for step in steps if step in losses), key=lambda step: (losses[step], step))
    kept = {*sorted(steps)[-rule.keep_last :], *scored[: rule.keep_best]}
    if rule.keep_every is not None:
        kept |= {step for step in steps if step % rule.keep_every == 0}
    return kept


def plan_deletions(
    on_disk: Collection[int],
    rule: CheckpointSection,
    losses: Mapping[int, float],
    scored: Collection[int] | None,
    confirmed: Collection[int] | None,
    verified_newest: int | None,
) -> tuple[set[int], dict[int, str]]:
    """Which steps to delete, and of those that the rule would delete too, why each has to stay for now.

    Args:
        on_disk: steps of the published checkpoints.
        losses: held-out losses, as far as they are known.
        scored: steps whose checkpoint, as it lies there, has a score; None: scoring is off, nobody waits for one.
        confirmed: steps whose checkpoint has been read back from the Hub; None: nothing is uploaded.
        verified_newest: the newest step whose files match its manifest. It always stays; without one all stay.
    """
    whole = [] if verified_newest is None else [step for step in on_disk if step <= verified_newest]
    kept_of_whole = to_keep(whole, losses, rule)
    deleted: set[int] = set()
    held: dict[int, str] = {}
    for step in sorted(set(on_disk) - to_keep(on_disk, losses, rule)):
        if verified_newest is None:
            held[step] = "no checkpoint verifies"
        elif step == verified_newest:
            held[step] = "the newest one that verifies"
        elif step > verified_newest:
            held[step] = "not verified"
        elif step in kept_of_whole:  # newer ones push it out, but nobody knows that they are whole
            held[step] = f"those after step {verified_newest} are not verified"
        elif scored is not None and step not in scored:
            held[step] = UNSCORED
        elif confirmed is not None and step not in confirmed:
            held[step] = UNCONFIRMED
        else:
            deleted.add(step)
    return deleted, held


def deletable(
    run: RunDir, config: RunConfig, verified_newest: int | None, trusts_uploads: bool = True
) -> tuple[set[int], dict[int, str]]:
    """`plan_deletions` for a run as it is now, from its ledgers.

    Without `trusts_uploads` none counts as confirmed: nobody has looked yet whether they are still on the Hub.

    A score or an upload counts only for the very checkpoint that lies there: a step may have been saved again. A tag
    that was removed again counts as an upload, because the rule that removed it is the one that deletes here.
    """
    steps = run.checkpoint_steps()
    if config.service.start == "never":
        return plan_deletions(steps, config.checkpoint, ledger.heldout_losses(run), None, None, verified_newest)
    here = manifest.identities(run)
    losses = {step: s.loss for step, s in ledger.scores(run).items() if here.get(step) == s.checkpoint}
    confirmed = [
        step
        for step, upload in ledger.uploads(run).items()
        if trusts_uploads and here.get(step) == upload.checkpoint and upload.repo == config.hub.repo
    ]
    scored = None if config.service.score == "training" else losses
    uploaded = None if config.hub.repo is None else confirmed
    return plan_deletions(steps, config.checkpoint, losses, scored, uploaded, verified_newest)


def remove(run: RunDir, steps: Collection[int], on_rename: Callable[[], None] | None = None) -> None:
    """Delete these checkpoints; each vanishes in one rename, and what a crash leaves is `remove_leftovers`'.

    So is what cannot be deleted now: NFS keeps a file under another name while somebody on this machine reads it.
    `on_rename` is called between the two, for tests.
    """
    for step in sorted(steps):
        doomed = run.doomed(step)
        run.checkpoint(step).rename(doomed)
        if on_rename is not None:
            on_rename()
        shutil.rmtree(doomed, ignore_errors=True)  # a starting training may be at it too


def quarantine(run: RunDir, step: int) -> None:
    """Move a checkpoint that does not verify to `quarantined-STEP`, for whoever wants to look at it.

    Raises:
        FileNotFoundError: it is gone; then what is in quarantine may be it, moved there by the other of training and
            service, and stays.
    """
    run.checkpoint(step).stat()
    shutil.rmtree(run.quarantined(step), ignore_errors=True)
    run.checkpoint(step).rename(run.quarantined(step))


def why_none_left(run: RunDir) -> str | None:
    """Why a run without checkpoints must not begin again: it has saved, and would go on in its old ledgers, with its
    old scores. None where it never saved, or a checkpoint is there."""
    if run.checkpoint_steps():
        return None
    if quarantined := run.quarantined_steps():
        return (
            f"{run.checkpoints}: no checkpoint verifies; {run.quarantined(quarantined[-1]).name} is the newest of "
            f"{len(quarantined)} in quarantine (the run's events say why). One that is whole after all (a disk that "
            "was away) can be renamed back; or start anew with run.resume=never (moves this folder aside)"
        )
    if any(jsonl.read(records) for records in (run.saves, run.scores, run.uploads)):
        return (
            f"{run.checkpoints}: this run has saved checkpoints, and none of them is there any more. Bring one back "
            f"('llmtrain restore' takes it from the Hub, into another folder), give this run another run.name, or "
            "start anew with run.resume=never (this folder is moved aside, not deleted)"
        )
    return None


def remove_leftovers(run: RunDir) -> None:
    """Finish deletions that a crash, or a reader on NFS, has interrupted."""
    for doomed in run.checkpoints.glob(f"{rundir.DOOMED}*"):
        shutil.rmtree(doomed, ignore_errors=True)  # the other of training and service may be at it too


def prune(run: RunDir, losses: Mapping[int, float], rule: CheckpointSection) -> None:
    """For a run without a service: delete all that the rule does not keep."""
    remove_leftovers(run)
    steps = run.checkpoint_steps()
    remove(run, set(steps) - to_keep(steps, losses, rule))
