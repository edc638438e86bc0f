"""How training of a run ended, from its folder alone."""

import contextlib
import json

from launcher.display import when
from llmtrain import ledger, origin, unsaved
from llmtrain.rundir import RunDir


def is_complete(run: RunDir, total: int) -> bool:
    """Whether all steps are done and saved: metrics alone may end with a step whose save never happened.

    The checkpoint of the last step may be gone: the rule of `checkpoint` deletes it once it is scored.
    """
    if max(run.checkpoint_steps(), default=0) >= total or origin.read(run).finished:
        return True
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads(run.summary.read_text())["steps"]) >= total
    return False


def missing_save(run: RunDir) -> str:
    """Of a run that has done its last step and is not complete, for a person to mend."""
    saved = run.checkpoint_steps()
    where = f"from step {saved[-1]:,}" if saved else "from its beginning"
    return f"its last step was not saved: start it again, and it goes on {where}"


def lost_steps(run: RunDir) -> str | None:
    """What a process that was killed has cost, and what to do; None where training has noted how it ended."""
    lost = unsaved.find(run)
    if lost is None:
        return None
    where = f"goes on from step {lost.saved:,}" if lost.saved else "starts from the beginning"
    return f"{lost.describe()}: {lost.steps} are lost; started again, it {where}"


def last_failure(run: RunDir) -> str | None:
    """What training's last start failed with; None where it did not fail."""
    last = ledger.last_event(run, (*ledger.STARTS, "failed"))
    if last is None or last.kind != "failed":
        return None
    return f"training failed on {when(last.time)}, {last.message}"
