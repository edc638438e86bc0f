"""What a kill has cost: steps that were done and never saved.

Training notes how it ended: a stop that saved, a failure; its supervisor notes a restart. A process that was killed (by
the kernel where memory ran out, by `kill -9`, by a power cut) could note nothing, and that is how it is known.
"""

from dataclasses import dataclass

from llmtrain import jsonl, ledger, origin
from llmtrain.ledger import EventKind
from llmtrain.rundir import RunDir
from llmtrain.wording import name_range

_ENDS: tuple[EventKind, ...] = ("stopped", "failed", "restarted")


@dataclass(frozen=True)
class Unsaved:
    """Of a run whose last process is gone without a word."""

    saved: int
    """Step of the newest checkpoint; 0 without one."""
    reached: int
    """The last step that was written down."""

    @property
    def steps(self) -> str:
        return name_range(self.saved + 1, self.reached)

    def describe(self) -> str:
        return f"ended without saving at step {self.reached:,} (killed? out of memory?)"


def find(run: RunDir) -> Unsaved | None:
    """None where nothing was lost, where training has noted why, and at the end of the plan. Not for a run that trains.

    Raises:
        RunFolderError: a line of a ledger is damaged.
    """
    last = jsonl.last_record(run.metrics)
    reached, saved = 0 if last is None else int(last["step"]), max(run.checkpoint_steps(), default=0)
    if reached <= saved or origin.read(run).finished:  # its last checkpoint may be gone by the rule of `checkpoint`
        return None
    last_word = ledger.last_event(run, (*ledger.STARTS, *_ENDS))
    return Unsaved(saved, reached) if last_word is not None and last_word.kind in ledger.STARTS else None
