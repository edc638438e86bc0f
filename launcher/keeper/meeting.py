"""Where the nodes of a run agree: small files in a folder that all of them see.

Each node tells how its ranks ended, the first one decides what comes next, the others wait for that. One node alone
needs no folder: it remembers its own words.
"""

import contextlib
import json
import math
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.keeper.torchrun import Place
from llmtrain import files

_POLL_S = 0.1
_SETTLES_S = 3.0
"""Over a network one file may be seen later than another that was written after it."""
_TRIES = 5
_TRY_EVERY_S = 1.0
_BEAT_S = 10.0
_SILENT_S = 300.0
"""The first node's supervisor gives a sign of life every `_BEAT_S`; after so long without one it was killed. SLURM may
take a minute for an answer, and a look at a hang half a minute: it is silent then."""
_LOOK_S = 1.0


class FirstNodeGone(Exception):
    """The first node has ended without the word that the others wait for: its supervisor failed, or was killed."""


@dataclass
class _Pulse:
    """The first node's signs of life, as it gives them, or as another one sees them."""

    sign: Any = None
    silent_s: float = 0.0
    looked_at: float = -math.inf


@dataclass(frozen=True)
class Meeting:
    """Of one start of a job; `attempt` counts how often its ranks were started."""

    folder: Path | None
    """None: for one node of which nobody else wants to hear."""
    node: int = 0
    num_nodes: int = 1
    _own_words: dict[tuple[str, int], Any] = field(default_factory=dict[tuple[str, int], Any], compare=False)
    """Said here: a full disk keeps a node neither from saying nor from knowing them."""
    _pulse: _Pulse = field(default_factory=_Pulse, compare=False)

    def place(self, attempt: int) -> Place:
        """Where the ranks of this attempt meet: chosen by the first node, which is there itself."""
        own = own_name()
        if self.node == 0:
            self.tell("place", attempt, {"host": own, "port": _free_port()})
        chosen = self.wait_for_first("place", attempt)
        return Place(chosen["host"], chosen["port"], own)

    def tell(self, what: str, attempt: int, value: Any) -> None:
        self._own_words[what, attempt] = value
        if self.folder is None:
            return
        for tries_left in reversed(range(_TRIES)):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                files.write_atomic(self._file(self.folder, what, attempt, self.node), json.dumps(value))
                break
            except OSError:  # a file server that fails over says so for a moment; the other nodes wait for this word
                if not tries_left and self.num_nodes > 1:
                    raise
                time.sleep(_TRY_EVERY_S)

    def told(self, what: str, attempt: int) -> dict[int, Any]:
        """What the nodes have said, by node; those that have said nothing of that kind are left out."""
        found: dict[int, Any] = {}
        for node in range(self.num_nodes):
            if node == self.node and (what, attempt) in self._own_words:
                found[node] = self._own_words[what, attempt]
            elif self.folder is not None:
                with contextlib.suppress(OSError):  # it is not there yet; over NFS also: it is being replaced
                    found[node] = json.loads(self._file(self.folder, what, attempt, node).read_text())
        return found

    def wait_for_all(self, what: str, attempt: int, seconds: float) -> dict[int, Any]:
        """As `told`, once all have said it, or after so long."""
        deadline = time.monotonic() + seconds
        while len(found := self.told(what, attempt)) < self.num_nodes and time.monotonic() < deadline:
            self.beat()
            time.sleep(_POLL_S)
        return found

    def wait_for_first(self, what: str, attempt: int) -> Any:
        """What the first node says, however long it takes, as long as it lives.

        Raises:
            FirstNodeGone: it has ended, and not said that.
        """
        settled_at = math.inf
        while 0 not in (found := self.told(what, attempt)):
            if time.monotonic() > settled_at:
                raise FirstNodeGone(f"the first node has ended without a word on '{what}': its output says why")
            if settled_at == math.inf and self.first_is_gone():
                settled_at = time.monotonic() + _SETTLES_S
            time.sleep(_POLL_S)
        return found[0]

    def beat(self, last: bool = False) -> None:
        """The first node's sign of life, to be given again and again. `last`: it lives on, and gives no more."""
        now = time.monotonic()
        if self.node or self.folder is None or (now - self._pulse.looked_at < _BEAT_S and not last):
            return
        self._pulse.looked_at = now
        with contextlib.suppress(OSError):  # a disk that fails for a moment: the others cannot read then either
            self.folder.mkdir(parents=True, exist_ok=True)
            sign = json.dumps("last" if last else now)
            files.write_atomic(self._file(self.folder, "alive", 0, 0), sign)

    def first_is_gone(self) -> bool:
        """Whether the first node has ended: it says so last, however it ends; where it was killed it falls silent."""
        if 0 in self.told("over", 0):
            return True
        now, pulse = time.monotonic(), self._pulse
        if self.node and now - pulse.looked_at >= _LOOK_S:
            sign = self.told("alive", 0).get(0)
            is_silent = sign == pulse.sign and sign not in (None, "last")
            # A file server that hangs holds up the look itself: that time is not the first node's silence.
            pulse.silent_s = pulse.silent_s + min(now - pulse.looked_at, 2 * _LOOK_S) if is_silent else 0.0
            pulse.sign, pulse.looked_at = sign, time.monotonic()
        return pulse.silent_s > _SILENT_S

    def end(self) -> None:
        """The first node's last word."""
        self.tell("over", 0, True)

    @staticmethod
    def _file(folder: Path, what: str, attempt: int, node: int) -> Path:
        return folder / f"{what}-{attempt}-{node}.json"


def own_name() -> str:
    """A name of this machine that resolves: SLURM's, else its own."""
    for name in (os.environ.get("SLURMD_NODENAME"), socket.gethostname()):
        if name is None:
            continue
        try:
            socket.getaddrinfo(name, None)
        except socket.gaierror:
            continue
        return name
    return "127.0.0.1"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
