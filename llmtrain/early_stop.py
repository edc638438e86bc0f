"""What the service asks of training where the held-out loss no longer improves (`service.patience`): to end."""

import contextlib

import pydantic

from llmtrain import ranking
from llmtrain.ledger import Score
from llmtrain.rundir import RunDir


class EarlyStop(pydantic.BaseModel):
    """What service/stop.json says to training."""

    message: str
    saves: int
    """That have not improved."""


def read(run: RunDir) -> EarlyStop | None:
    """What the service has last said to training; nothing where its file is damaged."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return EarlyStop.model_validate_json(run.early_stop.read_bytes())
    return None


def asked_to_end(run: RunDir, patience: int | None) -> str | None:
    """Why the service asks training to end, if `service.patience` says so still: it may be larger than it was."""
    asked = read(run)
    return None if asked is None or patience is None or asked.saves < patience else asked.message


def saves_without_improvement(scored: dict[int, Score]) -> list[int]:
    """The steps of the checkpoints since the lowest held-out loss."""
    if not scored:
        return []
    best = min(scored.values(), key=ranking.order)
    return [step for step in scored if step > best.step]
