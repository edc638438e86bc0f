"""A Hugging Face Hub on the loopback, for the real client: repositories in memory, large objects on disk.

In a test's own process it is `with Hub(folder) as hub:`; where it has to outlive or be outlived by others it is a
process, `python -m tests.support.hub_server --folder DIR --port-file FILE`, and tests hold a `HubProcess`.

    hub_server.py   the Hub, and the process around it
    hub_routes.py   which path is whose; accounts, repositories, names of commits; control
    hub_uploads.py  large objects and commits
    hub_reading.py  listings and bytes
    hub_repos.py    repositories
    hub_wire.py     HTTP
    hub_faults.py   what can go wrong on command
"""

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote

from tests.support.hub_faults import Entry, Faults
from tests.support.hub_repos import Commit, File, Repo, Upload, repo_as_json
from tests.support.hub_routes import CONTROLS, ROUTES
from tests.support.hub_uploads import STORAGE
from tests.support.hub_wire import CONTROL, Answer, Refused, Request, Server, quota_refusal

TOKEN = "hf_" + "x" * 34


@dataclass(eq=False)
class Hub:
    """All that the server knows, and what tests ask it."""

    folder: Path
    tokens: dict[str, str] = field(default_factory=lambda: {TOKEN: "write"})  # or "read"
    user: str = "tester"
    lfs_above_bytes: int = 10 << 20
    multipart_above_bytes: int = 64 << 20
    part_bytes: int = 16 << 20
    page_size: int = 1000
    commit_quota: int | None = None  # commits per repository and window; the real Hub's is 128
    quota_window_s: float = 3600
    empty_commits: bool = False  # whether a commit without a change is made, or the head is answered
    control: bool = True

    def __post_init__(self) -> None:
        self.faults, self.closing, self.lock = Faults(), threading.Event(), threading.RLock()
        self.log: list[Entry] = []
        self.bugs: list[str] = []  # tracebacks of the server's own mistakes
        self.repos: dict[str, Repo] = {}
        self.uploads: dict[str, Upload] = {}
        self.port = 0
        self._server: Server | None = None
        for name in ("lfs", "uploads"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    # Life

    def start(self) -> Self:
        """Listens; after a stop on the same port, with all that was stored."""
        self.closing.clear()
        self._server = Server(("127.0.0.1", self.port), self)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def stop(self) -> None:
        """Ends all connections, those that hang included."""
        if self._server:
            self.closing.set()
            self._server.shutdown()
            self._server.cut_all()
            self._server.server_close()
            self._server = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # What tests ask

    def files(self, repo: str, revision: str = "main") -> dict[str, File]:
        return dict(self.repos[repo].find(revision).tree)

    def read(self, repo: str, path: str, revision: str = "main") -> bytes:
        file = self.files(repo, revision)[path]
        return self.object_path(file.sha256).read_bytes() if file.sha256 else file.content

    def commits(self, repo: str, revision: str = "main") -> list[Commit]:
        """Newest first."""
        return self.repos[repo].history(revision)

    def changes(self, repo: str, path: str, revision: str = "main") -> list[Commit]:
        """The commits that changed this path, newest first."""
        return self.repos[repo].changes(path, revision)

    def received_bytes(self, sha256: str) -> int:
        """Of this object, over all attempts, also those that did not come to their end."""
        return sum(entry.received for entry in self._puts(sha256))

    def transfers(self, sha256: str) -> int:
        """How many times this object came in full, whatever was answered."""
        with self.lock:
            size = next((u.size for u in self.uploads.values() if u.oid == sha256), 0)
        return sum(entry.received for entry in self._puts(sha256) if entry.complete) // size if size else 0

    def _puts(self, sha256: str) -> list[Entry]:
        return [e for e in self.log if e.method == "PUT" and e.path.startswith(f"{STORAGE}{sha256}/")]

    def state(self) -> dict[str, Any]:
        """All of it as plain data, for tests outside this process."""
        with self.lock:
            return {
                "repos": {name: repo_as_json(repo) for name, repo in self.repos.items()},
                "transfers": {oid: self.transfers(oid) for oid in {u.oid for u in self.uploads.values()}},
                "log": [asdict(entry) for entry in self.log],
                "bugs": self.bugs,
            }

    # What the server asks

    def answer(self, request: Request) -> Answer:
        for method, pattern, respond in [*ROUTES, *(CONTROLS if self.control else [])]:
            found = re.fullmatch(pattern, request.path)
            if found and request.method in method.split():
                return respond(self, request, *map(unquote, found.groups()))
        raise Refused(404, f"Sorry, we can't find the page you are looking for: {request.method} {request.path}")

    def role(self, request: Request) -> str:
        """Empty for someone without a token."""
        if request.token and request.token not in self.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.tokens.get(request.token, "")

    def may_write(self, request: Request) -> None:
        role = self.role(request)
        if not role:
            raise Refused(401, "Invalid username or password.")
        if role != "write":
            raise Refused(403, "You need a token with write access to do this")

    def open(self, request: Request, name: str, write: bool = False) -> Repo:
        role, repo = self.role(request), self.repos.get(name)
        if repo is None or (repo.private and not role):  # the same answer: who may not read it shall not know of it
            raise Refused(404, "Repository not found", "RepoNotFound")
        if write:
            self.may_write(request)
        return repo

    def object_path(self, sha256: str) -> Path:
        return self.folder / "lfs" / sha256

    def spend_quota(self, repo: Repo) -> None:
        if self.commit_quota is None:
            return
        now = time.monotonic()
        repo.committed_at = [at for at in repo.committed_at if at > now - self.quota_window_s]
        if len(repo.committed_at) >= self.commit_quota:
            wait_s = repo.committed_at[0] + self.quota_window_s - now
            raise quota_refusal(self.commit_quota, math.ceil(wait_s / 60))
        repo.committed_at.append(now)


# Outside a test's own process


def client_environment(endpoint: str, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    """For a process with the real client: it reads these once, at import. Xet would go past this server."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    return {
        **inherited,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **({"HF_TOKEN": token} if token else {}),
    }


class HubProcess:
    """A Hub in a process of its own, with the control endpoint; it ends with this process at the latest."""

    def __init__(self, folder: Path, *options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        port_file = folder / f"port-{uuid.uuid4().hex}"
        start = [sys.executable, "-m", "tests.support.hub_server", "--folder", str(folder), "--control"]
        with (folder / "hub.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*start, "--port-file", str(port_file), "--exit-with", str(os.getpid()), *options],
                cwd=Path(__file__).parents[2],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 30
        while not port_file.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the Hub did not start:\n{(folder / 'hub.log').read_text()}")
            time.sleep(0.01)
        self.endpoint = f"http://127.0.0.1:{port_file.read_text()}"

    def control(self, **wish: Any) -> None:
        """See set_faults."""
        self._ask("faults", json.dumps(wish).encode())

    def state(self) -> dict[str, Any]:
        return self._ask("state")

    def _ask(self, what: str, body: bytes | None = None) -> Any:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"{self.endpoint}{CONTROL}{what}", body, timeout=30) as answer:
            return json.load(answer)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where large objects are kept")
    parser.add_argument("--port-file", type=Path, required=True, help="written once the server listens")
    parser.add_argument("--token", action="append", help="a token that may write; without any, the tests' own")
    parser.add_argument("--read-token", action="append", default=[], help="a token that may only read")
    parser.add_argument("--control", action="store_true", help="faults and state over HTTP")
    parser.add_argument("--exit-with", type=int, metavar="PID", help="the parent process: end when it is gone")
    args = parser.parse_args()
    tokens = {**dict.fromkeys(args.read_token, "read"), **dict.fromkeys(args.token or [TOKEN], "write")}
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with Hub(args.folder, tokens, control=args.control) as hub:
        aside = args.port_file.with_name(f"{args.port_file.name}.writing")
        aside.write_text(str(hub.port))
        aside.replace(args.port_file)
        while not ended.wait(0.2) and args.exit_with in (None, os.getppid()):
            pass


if __name__ == "__main__":
    main()
