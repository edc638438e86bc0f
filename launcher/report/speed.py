"""How fast training was: from TensorBoard's event files, since the ledger has no times."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c

from llmtrain.rundir import RunDir

_TOKENS, _WAIT = "speed/tokens_per_s", "speed/save_wait_s"
_SHORT = 48
"""Bytes: events that mark a start are shorter than those with figures."""
_HEAD = struct.Struct("<QI")
"""Of a record: its length, and that one's checksum."""


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
    """Up to the first record that is damaged or not whole. Only the few that are wanted are decoded: a long run has
    a million of the others."""
    from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    tokens, wait = _TOKENS.encode(), _WAIT.encode()
    for record in _records(path):
        if tokens in record or wait in record or len(record) < _SHORT:
            yield Event.FromString(record)


def _records(path: Path) -> Iterator[bytes]:
    """As TensorBoard's own reader, which computes every checksum in Python: 20 s for a million records."""
    with path.open("rb") as file:
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            length, length_sum = _HEAD.unpack(head)
            if not _is_sum(head[:8], length_sum):
                return
            body = file.read(length + 4)
            data = body[:length]
            if len(body) < length + 4 or not _is_sum(data, int.from_bytes(body[length:], "little")):
                return
            yield data


def _is_sum(data: bytes, masked: int) -> bool:
    """Whether this is the CRC-32C of `data`, rotated and shifted as TFRecord has it."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF == masked
