"""Uploads that are not on the Hub any more: a person has deleted the repository or a tag, or rewritten its history.

The process that talks to the Hub compares (`hub.find_lost`), the service records: what is gone does not count as
uploaded, so it is sent again while it is on this disk, and the rule deletes nothing there because of it.
"""

import time
from typing import Any

from llmtrain import ledger, log, manifest
from llmtrain.ledger import Event, Upload
from llmtrain.rundir import RunDir
from llmtrain.wording import name_steps


def record(run: RunDir, repo: str, answer: dict[str, Any]) -> None:
    """Take down what a check has found. Told once: a next check misses only what the ledger still counts."""
    uploads, now = ledger.uploads(run), time.time()
    gone: list[int] = sorted(answer.get("gone", []))
    for step, commit in answer.get("moved", []):
        ledger.append(run.uploads, uploads[step].model_copy(update={"commit": commit, "time": now}))
        log.info(f"HUB: {repo}: the commit of step {step} is now {commit[:10]}: the history was rewritten")
    if gone:
        _tell(run, repo, gone, uploads)
    for step in [*gone, *answer.get("to_read", [])]:  # last: what is interrupted is told again rather than never
        ledger.append(run.uploads, uploads[step].model_copy(update={"gone": True, "time": now}))


def _tell(run: RunDir, repo: str, gone: list[int], uploads: dict[int, Upload]) -> None:
    here = manifest.identities(run)
    again = [step for step in gone if here.get(step) == uploads[step].checkpoint]
    lost = [step for step in gone if step not in again]
    parts = [f"{name_steps(again)} will be sent again from this disk"] if again else []
    parts += [f"of {name_steps(lost)} nothing is left on this disk"] if lost else []
    message = (
        f"{repo} does not hold {name_steps(gone)} any more as uploaded (deleted or changed on the Hub?): "
        f"{'; '.join(parts)}"
    )
    log.warning(f"HUB: {message}")
    ledger.append(run.service_events, Event(kind="upload-gone", message=message))
