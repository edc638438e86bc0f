"""Parts of a build: the tasks that each of N jobs takes, on machines of their own.

A part keeps nobody out but those who prepare or finish the build, and needs to know nothing of the other parts.
"""

import heapq
import re
from dataclasses import dataclass
from typing import Literal

from llmtrain.errors import UserError


@dataclass(frozen=True)
class Part:
    """Part `number` of `count`, from 0."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def choose_job(
    only: Literal["prepare"] | None, part: str | None, force: bool, show: int
) -> Literal["prepare"] | Part | None:
    """What the options ask for; None for the whole build.

    Raises:
        UserError: they do not go together.
    """
    if only and part is not None:
        raise UserError("--only prepare and --part are two jobs, one after the other: give one of them")
    if part is not None and force:
        raise UserError("--force would throw away what other parts have done: give it to --only prepare instead")
    if show and (only or part is not None):
        raise UserError("--show needs finished shards: give it to the command without --only and --part")
    return only if part is None else parse_part(part)


def parse_part(text: str) -> Part:
    """Read `I/N`.

    Raises:
        UserError: it is something else.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    part = Part(int(found[1]), int(found[2])) if found else None
    if part is None or part.number >= part.count:
        raise UserError(
            f"--part {text}: must be I/N, with I from 0 to N-1: of 3 parts the first is 0/3 and the last is 2/3"
        )
    return part


def choose_tasks(sizes: list[int], part: Part) -> list[int]:
    """Numbers of the tasks of a part. Parts are about equal in bytes, and their tasks come from all over the corpus.

    The largest task first, each to the part that has least: so a source that takes longer than others for
    its size is shared among all parts, and a large file does not stand at a part's end.
    """
    parts = [(0, number) for number in range(part.count)]
    chosen: list[int] = []
    for task in sorted(range(len(sizes)), key=lambda task: (-sizes[task], task)):
        size, number = parts[0]
        heapq.heapreplace(parts, (size + sizes[task], number))
        if number == part.number:
            chosen.append(task)
    return chosen
