"""Checkpoints: written aside, hashed, synced, renamed; found again, verified, pruned.

    step-00000100/model/       weights and tokenizer, as transformers loads them
    step-00000100/state/       optimizer.safetensors
    step-00000100/manifest.json

Nothing random is saved: dropout's generator is seeded from (seed, step, rank) at every step
(`trainer.seed_step`), and the schedule is a pure function of the step.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from llmtrain import files, log, manifest
from llmtrain.config.schema import CheckpointSection
from llmtrain.errors import CheckpointError, DiskFull, disk_errors
from llmtrain.manifest import Manifest
from llmtrain.rundir import RunDir
from llmtrain.strategies.interface import Strategy

_OPTIMIZER = "optimizer.safetensors"
_ASIDE = ".writing-"
_DOOMED = ".deleting-"

ModelWriter = Callable[[Path, dict[str, Tensor]], None]


def save(run: RunDir, strategy: Strategy, write_model: ModelWriter, described: Manifest) -> Path:
    """Write the checkpoint of `described.train_state.step`; it appears under its name when it is whole.

    Raises:
        DiskFull: there is no room; nothing is left behind, earlier checkpoints are untouched.
    """
    final = run.checkpoint(described.train_state.step)
    aside = run.checkpoints / f"{_ASIDE}{final.name}"
    if final.exists():  # a resumed run may save the same step once more
        return final
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with disk_errors(f"checkpoint {final.name}", run.checkpoints):
            weights, state = strategy.weights(), strategy.save_state()
            _check_room(run, weights, state)
            (aside / "model").mkdir(parents=True)
            (aside / "state").mkdir()
            write_model(aside / "model", weights)
            save_file(state, aside / "state" / _OPTIMIZER)
            whole = described.model_copy(update={"files": manifest.describe_files(aside)})
            manifest.write(aside, whole)
            for folder in (aside / "model", aside / "state", aside):
                files.sync(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    aside.rename(final)
    files.sync(run.checkpoints)
    return final


def load(folder: Path, strategy: Strategy) -> None:
    """Give the saved optimizer state to `strategy`. The weights are loaded by the model, before."""
    path = folder / "state" / _OPTIMIZER
    try:
        strategy.load_state(load_file(path))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def newest_whole(run: RunDir) -> int | None:
    """Step of the newest checkpoint that verifies; says which file made it reject a newer one.

    Raises:
        CheckpointError: there are checkpoints, but none verifies.
    """
    rejected = []
    for step in reversed(run.checkpoint_steps()):
        try:
            manifest.verify(run.checkpoint(step))
        except CheckpointError as error:
            rejected.append(str(error))
            log.warning(f"checkpoint {run.checkpoint(step).name} rejected: {error}")
            continue
        return step
    if rejected:
        raise CheckpointError(
            f"{run.checkpoints}: no checkpoint verifies; the last reason: {rejected[0]}. "
            "Start anew with run.resume=never (this folder is moved aside, not deleted)"
        )
    return None


def discard_after(run: RunDir, step: int) -> None:
    """Remove what a resumed run will write again: newer, rejected checkpoints and half-written ones.

    A rejected checkpoint is moved to `rejected-STEP`, for whoever wants to look at it.
    """
    for newer in (s for s in run.checkpoint_steps() if s > step):
        target = run.checkpoints / f"rejected-{run.checkpoint(newer).name}"
        shutil.rmtree(target, ignore_errors=True)
        run.checkpoint(newer).rename(target)
    remove_leftovers(run)


def remove_leftovers(run: RunDir) -> None:
    """Delete what a killed save or a killed deletion left behind."""
    for prefix in (_ASIDE, _DOOMED):
        for path in run.checkpoints.glob(f"{prefix}*"):
            shutil.rmtree(path)


def to_keep(steps: list[int], heldout: dict[int, float], rule: CheckpointSection) -> set[int]:
    """The steps that the rule keeps: the last, the best on held-out data, and every n-th."""
    scored = sorted((step for step in steps if step in heldout), key=lambda step: (heldout[step], step))
    kept = {*sorted(steps)[-rule.keep_last :], *scored[: rule.keep_best]}
    if rule.keep_every is not None:
        kept |= {step for step in steps if step % rule.keep_every == 0}
    return kept


def prune(run: RunDir, heldout: dict[int, float], rule: CheckpointSection) -> None:
    """Delete the checkpoints that the rule does not keep; each vanishes in one rename."""
    steps = run.checkpoint_steps()
    for step in set(steps) - to_keep(steps, heldout, rule):
        doomed = run.checkpoints / f"{_DOOMED}{run.checkpoint(step).name}"
        run.checkpoint(step).rename(doomed)
        shutil.rmtree(doomed)


def _check_room(run: RunDir, weights: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    needed = sum(t.numel() * t.element_size() for t in (*weights.values(), *state.values()))
    free = shutil.disk_usage(run.checkpoints).free
    if needed > free:
        raise DiskFull(
            f"a checkpoint takes {needed / 1e6:,.0f} MB, but {run.checkpoints} has only {free / 1e6:,.0f} MB free; "
            "free some space or keep fewer (checkpoint.keep_last, checkpoint.keep_best), then run the same "
            "command again: it goes on from the last checkpoint"
        )
