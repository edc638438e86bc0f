"""Looks after hangs during one attempt, on one node, and hears the other nodes before it says who hangs.

The ranks that stand still on a node may only wait for one on another node. So a node that sees such asks the others:
each writes down what its ranks do, and the one that has asked decides. What it ends, ends for all.
"""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.keeper import hangs
from launcher.keeper.hangs import Seen
from launcher.keeper.meeting import Meeting

_AGAIN_S = 2.0
"""Before the second look: the rank that hangs may cross the limit just after those that wait for it."""
_ANSWER_S = 10.0
_POLL_S = 0.1
_PAUSED_S = 15.0
"""If this supervisor has not run for so long, it was suspended with its ranks: start counting again."""


class HangWatch:
    """Watches one attempt; call `look` about once a second."""

    def __init__(self, meeting: Meeting, attempt: int, beats: Path, limit_s: float):
        """`beats`: where the ranks of this node leave their signs of life."""
        self._meeting, self._attempt, self._beats, self._limit_s = meeting, attempt, beats, limit_s
        self._since = self._looked_at = time.monotonic()
        self._asked = 0
        self._answered: dict[int, int] = {}

    def look(self) -> list[Seen]:
        """The ranks that hang. If some seem to, it takes some seconds more to be sure."""
        now = time.monotonic()
        if now - self._looked_at > _PAUSED_S:
            self._since = now
        self._looked_at = now
        self._answer()
        if now - self._since < self._limit_s or not hangs.culprits(self._own()):
            return []
        time.sleep(_AGAIN_S)
        others = self._ask()
        self._looked_at = time.monotonic()
        return hangs.culprits([*self._own(), *others])

    def _own(self) -> list[Seen]:
        return hangs.look(self._beats, self._limit_s)

    def _ask(self) -> list[Seen]:
        """What the ranks of the other nodes do; of those nodes that answer in time."""
        self._asked += 1
        self._tell()
        deadline = time.monotonic() + _ANSWER_S
        while True:
            self._answer()  # two that ask each other
            own, messages = str(self._meeting.node), self._messages().values()
            answers = [each for each in messages if each["answered"].get(own) == self._asked]
            if len(answers) == self._meeting.num_nodes - 1 or time.monotonic() > deadline:
                return [Seen(**rank) for each in answers for rank in each["ranks"]]
            time.sleep(_POLL_S)

    def _answer(self) -> None:
        """Tell the others what the ranks here do, if another node has asked since the last time."""
        if self._meeting.num_nodes == 1:
            return
        asked = {node: message["asked"] for node, message in self._messages().items() if message["asked"]}
        if asked != self._answered:
            self._answered = asked
            self._tell()

    def _tell(self) -> None:
        ranks = [asdict(each) for each in self._own()]
        self._meeting.tell("seen", self._attempt, {"asked": self._asked, "answered": self._answered, "ranks": ranks})

    def _messages(self) -> dict[int, Any]:
        """The latest message of each other node, by node."""
        return {n: said for n, said in self._meeting.told("seen", self._attempt).items() if n != self._meeting.node}
