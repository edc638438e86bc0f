"""Which checkpoints stay, and deleting the others: in one rename each, so that none is ever half there.

The checkpoint service deletes, and nobody else; without one (service.start=never) training does.
"""

import shutil
from collections.abc import Collection, Mapping

from llmtrain import rundir
from llmtrain.config.schema import CheckpointSection
from llmtrain.rundir import RunDir


def to_keep(steps: Collection[int], losses: Mapping[int, float], rule: CheckpointSection) -> set[int]:
    """The steps that the rule keeps: the last, the best on held-out data, and every n-th."""
    scored = sorted((step for step in steps if step in losses), key=lambda step: (losses[step], step))
    kept = {*sorted(steps)[-rule.keep_last :], *scored[: rule.keep_best]}
    if rule.keep_every is not None:
        kept |= {step for step in steps if step % rule.keep_every == 0}
    return kept


def remove(run: RunDir, steps: Collection[int]) -> None:
    """Delete these checkpoints; each vanishes in one rename, and what a crash leaves is `remove_leftovers`'."""
    for step in sorted(steps):
        doomed = run.doomed(step)
        run.checkpoint(step).rename(doomed)
        shutil.rmtree(doomed)


def quarantine(run: RunDir, step: int) -> None:
    """Move a checkpoint that does not verify to `quarantined-STEP`, for whoever wants to look at it."""
    shutil.rmtree(run.quarantined(step), ignore_errors=True)
    run.checkpoint(step).rename(run.quarantined(step))


def remove_leftovers(run: RunDir) -> None:
    """Finish deletions that a crash has interrupted."""
    for doomed in run.checkpoints.glob(f"{rundir.DOOMED}*"):
        shutil.rmtree(doomed, ignore_errors=True)  # the other of training and service may be at it too


def prune(run: RunDir, losses: Mapping[int, float], rule: CheckpointSection) -> None:
    """For a run without a service: delete all that the rule does not keep."""
    steps = run.checkpoint_steps()
    remove(run, set(steps) - to_keep(steps, losses, rule))
