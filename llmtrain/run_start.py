"""Makes the run folder ready for a start: from the newest whole checkpoint, or from the beginning."""

import contextlib

from llmtrain import checkpoint, files, jsonl, ledger, log, manifest, model_files, resume, retention, summary, unsaved
from llmtrain.config import RunConfig, resolved_yaml
from llmtrain.config.load import Origins
from llmtrain.errors import CheckpointError, DataMismatch, RunFolderError
from llmtrain.ledger import Event
from llmtrain.rundir import RunDir
from llmtrain.shards import ShardFolder
from llmtrain.wording import name_range


def prepare_run(run: RunDir, config: RunConfig, origins: Origins, data: ShardFolder, total_steps: int) -> int | None:
    """Make the run folder ready; returns the step to resume from, None to start.

    Args:
        total_steps: what `config` plans. A run that has come further keeps the length that it had: nothing is left
            to do for this one, and reports should not say 200 of 80 steps.

    Raises:
        RunFolderError: it holds checkpoints of another configuration.
        DataMismatch: it holds checkpoints of other data.
        CheckpointError: there is nothing to resume from although `run.resume=must`, or nothing verifies.
    """
    run.create()
    files.remove_asides(run.path)
    checkpoint.remove_leftovers(run)
    retention.remove_leftovers(run)
    before = resume.check(run, config, origins)  # again: since the first time shards may have been built for hours
    step = None if before is None else _newest_of(run, data)
    last = -1 if step is None else step
    if last < total_steps:
        summary.discard(run)
    again = _note_unsaved(run, last)
    for records in (run.metrics, run.heldout, run.samples):
        jsonl.rewind(records, last)
    _warn_of_lost_records(run, last)
    if step is None:
        for old in run.tensorboard.glob("events.*"):  # of a start that never saved
            old.unlink()
        begun = model_files.describe_start(config) or "from the beginning"
        ledger.append(run.events, Event(kind="started", message=f"{begun}{again}", step=0))
    else:
        for rejected in checkpoint.discard_after(run, step):
            message = f"did not verify, moved to {run.quarantined(rejected)}"
            ledger.append(run.events, Event(kind="rejected", message=message, step=rejected))
        ledger.append(run.events, Event(kind="resumed", message=f"from step {step:,}{again}", step=step))
        if before is not None and step > total_steps:
            config = _with_length_of(config, before)
    files.write_atomic(run.config, resolved_yaml(config))
    return step


def _newest_of(run: RunDir, data: ShardFolder) -> int | None:
    """The step of the newest checkpoint that verifies, if it can go on with these data."""
    step = checkpoint.newest_whole(run)
    if step is not None:
        described = manifest.read(run.checkpoint(step))
        if described.fingerprint != data.fingerprint:
            raise DataMismatch(
                f"{run.checkpoint(step)} was trained on other data (fingerprint {described.fingerprint[:12]}, the "
                f"shards in {data.path} have {data.fingerprint[:12]}): the source text has changed since, or these "
                "shards were made by another version of llmtrain, which cuts samples or counts their text differently. "
                "Bring the old shards back, or make them again ('llmtrain shard CONFIG --force') of the old text with "
                "the version that made them; this one goes on with them. Or give this run another run.name"
            )
        if not any(name.startswith("state/optimizer-") for name in described.files):
            raise CheckpointError(
                f"{run.checkpoint(step)}: its optimizer state was written by an older version of llmtrain, in a form "
                "that this one does not read: go on with that version. This one scores, exports and generates with it"
            )
    return step


def _note_unsaved(run: RunDir, last: int) -> str:
    """Before records are rewound to `last`: note that the process before was killed, if so; returns, for the event
    that follows, which steps are done again."""
    jsonl.mend(run.events)
    with contextlib.suppress(RunFolderError, ValueError):  # a damaged line of a ledger keeps no run from going on
        if (lost := unsaved.find(run)) is not None:
            ledger.append(run.events, Event(kind="unsaved", message=lost.describe(), step=lost.reached))
            log.warning(f"unsaved    the start before {lost.describe()}; {lost.steps} are done again")
    reached = jsonl.last_record(run.metrics)
    first = max(last, 0) + 1
    if reached is None or reached["step"] < first:
        return ""
    return f"; {name_range(first, int(reached['step']))} again"


def _warn_of_lost_records(run: RunDir, step: int) -> None:
    last = jsonl.last_record(run.metrics)
    written = 0 if last is None else int(last["step"])
    if written < step:
        log.warning(
            f"records    {run.metrics} ends at step {written:,}, before the checkpoint of step {step:,} that the run "
            "goes on from: curves and the report lack what was between (after a power loss, or a restore)"
        )


def _with_length_of(config: RunConfig, old: RunConfig) -> RunConfig:
    length = {name: getattr(old.train, name) for name in ("steps", "epochs", "tokens")}
    return config.model_copy(update={"train": config.train.model_copy(update=length)})
