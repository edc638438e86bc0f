"""Faults on command: which request the loopback Hub fails, and how. The wire (hub_wire.py) carries them out.

A fault is found for a request before its body is read, so that it can strike at any point: before the
body (`status`, `hang`), in it (`cut_request`, `slow_request`), after the Hub has acted on it (`lost_answer`)
or in the answer (`cut_response`, `slow_response`).
"""

import random
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

# What each kind strikes where a test does not say: a regular expression over "METHOD /path", the path still quoted.
STRIKES = {
    "status": "",  # answers `status` (with `message`, `html`, `retry_after_s`); nothing is applied
    "quota": "^POST .*/commit/",  # 429 in the words of the Hub's hourly limit on commits, `minutes` to wait
    "expired_token": "",  # 401 for every request that carries a token, until cleared
    "reject_upload": "^PUT ",  # the storage reads all of an object and refuses it
    "cut_request": "",  # the connection ends after `after_bytes` of the request's body
    "cut_response": "",  # the connection ends after `after_bytes` of the answer's body
    "lost_answer": "",  # the request is applied, and the connection ends without a word
    "slow_request": "",  # the body is read at `bytes_per_s`
    "slow_response": "",  # the answer is sent at `bytes_per_s`
    "hang": "",  # no answer for `seconds`, or until the Hub stops; then the connection ends
    "wrong_visibility": "^POST /api/repos/create$",  # answers as asked, and stores the opposite
    "wrong_hash": "",  # listings and ETags tell another hash for files whose path in the repository matches
}
STANDING = {"expired_token", "wrong_hash"}
ALWAYS = 10**9


@dataclass
class Entry:
    """A line of the log. The token itself is never kept."""

    method: str
    path: str
    authorised: bool
    received: int = 0  # bytes of the body, framing excluded
    complete: bool = False  # the body came to its end
    status: int | None = None  # None: no answer was sent
    fault: str = ""
    started: float = field(default_factory=time.time)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Fault:
    kind: str
    match: str = ""  # a regular expression over "METHOD /path"; for wrong_hash over the path in the repository
    times: int = 0  # matching requests that it strikes; 0: one, or ALWAYS for the standing kinds
    skip: int = 0  # matching requests that pass first
    status: int = 500
    message: str = ""
    html: bool = False  # a gateway's page instead of the Hub's JSON
    retry_after_s: int | None = None
    minutes: int = 37
    after_bytes: int = 0
    bytes_per_s: int = 0
    seconds: float | None = None
    reset: bool = True  # a cut sends RST (the client's ReadError) instead of FIN (its RemoteProtocolError)
    struck: int = 0

    def __post_init__(self) -> None:
        if self.kind not in STRIKES:
            raise ValueError(f"fault kind={self.kind!r}; use one of {', '.join(STRIKES)}")
        self.match = self.match or STRIKES[self.kind]
        self.times = self.times or (ALWAYS if self.kind in STANDING else 1)

    def fits(self, entry: "Entry") -> bool:
        if self.kind == "wrong_hash" or (self.kind == "expired_token" and not entry.authorised):
            return False
        return re.search(self.match, f"{entry.method} {entry.path}") is not None

    def strikes(self) -> bool:
        """Counts a matching request; true if the fault is for this one."""
        if self.skip:
            self.skip -= 1
            return False
        if self.struck >= self.times:
            return False
        self.struck += 1
        return True


@dataclass
class Rhythm:
    """A fault on every n-th request; the kinds in turn, or drawn from a seed."""

    n: int
    faults: list[Fault]
    exclude: str
    draw: random.Random | None
    seen: int = 0
    turn: int = 0

    def take(self, entry: "Entry") -> Fault | None:
        if self.exclude and re.search(self.exclude, f"{entry.method} {entry.path}"):
            return None
        self.seen += 1
        fitting = [fault for fault in self.faults if fault.fits(entry)]
        if self.seen % self.n or not fitting:
            return None
        self.turn += 1
        return replace(self.draw.choice(fitting) if self.draw else fitting[(self.turn - 1) % len(fitting)])


class Faults:
    """The faults that are waiting for a request that they match."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[Fault] = []
        self._rhythm: Rhythm | None = None

    def add(self, kind: str, match: str = "", times: int = 0, **settings: Any) -> Fault:
        fault = Fault(kind, match, times, **settings)
        with self._lock:
            self._waiting.append(fault)
        return fault

    def every_nth(
        self, n: int, kinds: Sequence[str | dict[str, Any]], seed: int | None = None, exclude: str = ""
    ) -> None:
        """A kind is a name or the fields of a Fault (`times` and `skip` mean nothing here); n=0 ends it.

        Without a seed the kinds that fit a request come in turn. What `add` has waiting goes first.
        """
        faults = [Fault(**kind) if isinstance(kind, dict) else Fault(kind) for kind in kinds]
        draw = None if seed is None else random.Random(seed)
        with self._lock:
            self._rhythm = Rhythm(n, faults, exclude, draw) if n else None

    def clear(self) -> None:
        with self._lock:
            self._waiting, self._rhythm = [], None

    def take(self, entry: "Entry") -> Fault | None:
        with self._lock:
            struck = next((fault for fault in self._waiting if fault.fits(entry) and fault.strikes()), None)
            return struck or (self._rhythm.take(entry) if self._rhythm else None)

    def lies_about(self, path: str) -> bool:
        """Whether a wrong hash is told for this path in the repository."""
        with self._lock:
            lies = [f for f in self._waiting if f.kind == "wrong_hash" and re.search(f.match, path)]
            return any(fault.strikes() for fault in lies)
