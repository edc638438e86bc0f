"""Where the nodes of a run agree: small files in a folder that all of them see.

Each node tells how its ranks ended, the first one decides what comes next, the others wait for that. One node alone
does the same in a folder of its own.
"""

import contextlib
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.keeper.torchrun import Place
from llmtrain import files

_POLL_S = 0.1


@dataclass(frozen=True)
class Meeting:
    """Of one start of a job; `attempt` counts how often its ranks were started."""

    folder: Path
    node: int = 0
    num_nodes: int = 1

    def place(self, attempt: int) -> Place:
        """Where the ranks of this attempt meet: chosen by the first node, which is there itself."""
        own = own_name()
        if self.node == 0:
            self.tell("place", attempt, {"host": own, "port": _free_port()})
        chosen = self.wait_for_first("place", attempt)
        return Place(chosen["host"], chosen["port"], own)

    def tell(self, what: str, attempt: int, value: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        files.write_atomic(self._file(what, attempt, self.node), json.dumps(value))

    def told(self, what: str, attempt: int) -> dict[int, Any]:
        """By node; of those that have said it."""
        found: dict[int, Any] = {}
        for node in range(self.num_nodes):
            with contextlib.suppress(OSError):  # it is not there yet; over NFS also: it is being replaced
                found[node] = json.loads(self._file(what, attempt, node).read_text())
        return found

    def wait_for_all(self, what: str, attempt: int, seconds: float) -> dict[int, Any]:
        """As `told`, once all have said it, or after so long."""
        deadline = time.monotonic() + seconds
        while len(found := self.told(what, attempt)) < self.num_nodes and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return found

    def wait_for_first(self, what: str, attempt: int) -> Any:
        """What the first node says, however long it takes: a node that is gone ends the job."""
        while 0 not in (found := self.told(what, attempt)):
            time.sleep(_POLL_S)
        return found[0]

    def _file(self, what: str, attempt: int, node: int) -> Path:
        return self.folder / f"{what}-{attempt}-{node}.json"


def own_name() -> str:
    """A name of this machine under which it is known: SLURM's, or its own."""
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
