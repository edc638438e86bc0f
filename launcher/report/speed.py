"""How fast training was: from TensorBoard's event files, since the ledger has no times."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtrain.rundir import RunDir

_TOKENS, _WAIT = "speed/tokens_per_s", "speed/save_wait_s"
_SHORT = 48
"""Bytes: events that mark a start are shorter than those with figures."""


@dataclass(frozen=True)
class Speed:
    """By step; empty where TensorBoard was switched off."""

    tokens_per_s: dict[int, float] = field(default_factory=dict[int, float])
    save_wait_s: dict[int, float] = field(default_factory=dict[int, float])
    """How long training stood still for a save."""


def read_speed(run: RunDir) -> Speed:
    """From all starts of a run; steps that a resumed run computed again count once, as in TensorBoard."""
    speed = Speed()
    for path in sorted(run.tensorboard.glob("events.*")):
        for event in _events(path):
            if event.HasField("session_log"):
                for values in (speed.tokens_per_s, speed.save_wait_s):
                    for step in [step for step in values if step >= event.step]:
                        del values[step]
            for value in event.summary.value:
                if value.tag == _TOKENS:
                    speed.tokens_per_s[event.step] = value.simple_value
                elif value.tag == _WAIT:
                    speed.save_wait_s[event.step] = value.simple_value
    return speed


def _events(path: Path) -> Iterator[Any]:
    """Only the few that are wanted are decoded: a long run has a hundred thousand of the others."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    wanted = _TOKENS.encode(), _WAIT.encode()
    for record in RawEventFileLoader(str(path)).Load():
        if len(record) < _SHORT or any(tag in record for tag in wanted):
            yield Event.FromString(record)
