"""The limits within which a run is kept going. Jobs in the queue hold theirs, also across an upgrade."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """How often to restart, and how long to wait for what."""

    max_restarts: int = 3
    """After failures in a row without a new checkpoint."""
    hang_s: float = 600.0
    """A rank that makes no progress for so long hangs; 0: nobody looks."""
    grace_s: float = 600.0
    """For ranks that were asked to stop, until they are killed: they save first. More where saves take longer, less
    before the time limit."""
    ends_at: float | None = None
    """When the job is killed, in seconds since 1970; None: never, or not known here."""
    lead_s: float = 120.0
    """The run saves and stops so long before that; at most half of what was left at the start."""
    may_requeue: bool = False
    """A job that is queued again after a stop by SLURM, and on other nodes once a GPU is lost. Else it ends with the
    stop, and after the loss starts again here."""
