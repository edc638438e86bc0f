"""The wire of the loopback Hub: requests and answers, a log of both, and faults on command.

A fault is found for a request before its body is read, so that it can strike at any point: before the
body (`status`, `hang`), in it (`cut_request`, `slow_request`), after the Hub has acted on it (`lost_answer`)
or in the answer (`cut_response`, `slow_response`).
"""

import json
import os
import random
import re
import socket
import struct
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import parse_qsl, urlsplit

PIECE_BYTES = 1 << 16
CONTROL = "/_control/"

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


class Cut(Exception):
    """Ends the connection here; nothing more is sent."""


class Refused(Exception):
    """An answer other than success."""

    def __init__(
        self, status: int, message: str, code: str = "", retry_after_s: int | None = None, html: bool = False
    ) -> None:
        super().__init__(message)
        headers = {"Retry-After": str(retry_after_s)} if retry_after_s is not None else {}
        if html:  # from a gateway in front of the Hub, which knows nothing of its headers
            page = f"<html><body><h1>{status} {message}</h1></body></html>".encode()
            self.answer = Answer(status, page, {**headers, "Content-Type": "text/html"})
            return
        # The Hub says it twice: the client reads the header, people read the body.
        headers |= {"X-Error-Message": message.replace("\n", " "), **({"X-Error-Code": code} if code else {})}
        self.answer = Answer(status, json.dumps({"error": message}).encode(), headers)


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


class Body:
    """A request's body in pieces, with a Content-Length or chunked."""

    def __init__(self, stream: BinaryIO, headers: Any, entry: Entry, pause: Any) -> None:
        self._stream, self._entry, self._pause = stream, entry, pause
        self._chunked = "chunked" in headers.get("Transfer-Encoding", "").lower()
        self._left = 0 if self._chunked else int(headers.get("Content-Length") or 0)
        entry.complete = not self._chunked and not self._left
        self.bytes_per_s = 0

    def pieces(self, limit: int | None = None) -> Iterator[bytes]:
        """To the end, or until about `limit` bytes more have been read."""
        end = None if limit is None else self._entry.received + limit
        while not self._entry.complete and (end is None or self._entry.received < end):
            size = PIECE_BYTES if not self.bytes_per_s else max(1, self.bytes_per_s // 20)
            piece = self._read(size if end is None else min(size, end - self._entry.received))
            self._entry.received += len(piece)
            if self.bytes_per_s:
                self._pause(len(piece) / self.bytes_per_s)
            yield piece

    def _read(self, size: int) -> bytes:
        if self._chunked and not self._left:
            self._left = self._chunk_size()
        piece = self._stream.read1(min(size, self._left)) if self._left else b""  # type: ignore[attr-defined]
        if self._left and not piece:
            raise ConnectionError("the client left in the middle of a body")
        self._left -= len(piece)
        if self._chunked and not self._left:
            self._stream.readline()  # the line end after a chunk, or after the last one
        self._entry.complete = not self._left and (not self._chunked or not piece)
        return piece

    def _chunk_size(self) -> int:
        line = self._stream.readline()
        if not line:
            raise ConnectionError("the client left between two chunks")
        return int(line.split(b";")[0], 16)

    def all(self) -> bytes:
        return b"".join(self.pieces())

    def json(self) -> Any:
        return json.loads(self.all() or b"{}")

    def drain(self, limit: int | None = None) -> None:
        for _ in self.pieces(limit):
            pass


@dataclass
class Request:
    method: str
    path: str  # still quoted
    query: dict[str, str]
    headers: Any
    body: Body
    token: str = field(repr=False)
    fault: Fault | None = None


@dataclass
class Answer:
    status: int = 200
    content: bytes | Path = b""
    headers: dict[str, str] = field(default_factory=dict)
    start: int = 0  # of the part of the content that was asked for
    length: int | None = None

    def __len__(self) -> int:
        whole = self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)
        return whole - self.start if self.length is None else self.length

    def pieces(self, size: int) -> Iterator[bytes]:
        """Large files go from disk in pieces, so that they never sit in memory."""
        left = len(self)
        if isinstance(self.content, bytes):
            end = self.start + left
            yield from (self.content[at : min(at + size, end)] for at in range(self.start, end, size))
            return
        with self.content.open("rb") as file:
            file.seek(self.start)
            while left and (piece := file.read(min(size, left))):
                left -= len(piece)
                yield piece


class Site(Protocol):
    """What the wire needs of the Hub behind it."""

    faults: Faults
    log: list[Entry]
    bugs: list[str]
    closing: threading.Event

    def answer(self, request: Request) -> Answer: ...


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], site: Site) -> None:
        super().__init__(address, Handler)
        self.site = site
        self._connections: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def cut_all(self) -> None:
        """Kept-alive connections would outlive the server, each with a thread."""
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A mistake of ours must not pass for a fault: `Hub.bugs` is for tests to look at."""
        self.site.bugs.append(traceback.format_exc())
        super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def serve(self) -> None:
        site, url = self.server.site, urlsplit(self.path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        entry = Entry(self.command, url.path, authorised=bool(token))
        fault = None
        if not url.path.startswith(CONTROL):
            site.log.append(entry)
            fault = site.faults.take(entry)
        entry.fault = fault.kind if fault else ""
        body = Body(self.rfile, self.headers, entry, self.pause)
        request = Request(self.command, url.path, dict(parse_qsl(url.query)), self.headers, body, token, fault)
        try:
            self.send(self.answer(request), entry, fault)
        except Cut:
            self.cut(reset=fault is None or fault.reset)
        except ConnectionError:  # the client left first
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve  # noqa: N815

    def answer(self, request: Request) -> Answer:
        try:
            if request.fault:
                self.before(request.fault, request.body)
            answer = self.server.site.answer(request)
        except Refused as refused:
            answer = refused.answer
        # What a refusal left unread would be taken for the next request of this connection.
        request.body.drain()
        if request.fault and request.fault.kind == "lost_answer":
            raise Cut
        return answer

    def before(self, fault: Fault, body: Body) -> None:
        """What a fault does ahead of the Hub."""
        match fault.kind:
            case "status":
                message = fault.message or "Out of order"
                raise Refused(fault.status, message, retry_after_s=fault.retry_after_s, html=fault.html)
            case "quota":
                raise quota_refusal(128, fault.minutes, fault.retry_after_s)
            case "expired_token":
                raise Refused(401, "Invalid credentials in Authorization header")
            case "reject_upload":
                raise Refused(fault.status if fault.status != 500 else 400, "BadDigest: the checksum does not match")
            case "cut_request":
                body.drain(fault.after_bytes)
                raise Cut
            case "slow_request":
                body.bytes_per_s = fault.bytes_per_s
            case "hang":
                self.server.site.closing.wait(fault.seconds)
                raise Cut

    def send(self, answer: Answer, entry: Entry, fault: Fault | None) -> None:
        length, kind = len(answer), fault.kind if fault else ""
        if kind == "cut_response" and (not length or self.command == "HEAD"):
            raise Cut  # there is no body to cut
        entry.status = answer.status
        self.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault and kind == "cut_response":
            answer = replace(answer, length=min(fault.after_bytes, length - 1))
        rate = fault.bytes_per_s if fault and kind == "slow_response" else 0
        for piece in answer.pieces(max(1, rate // 20) if rate else PIECE_BYTES):
            if rate:
                self.pause(len(piece) / rate)
            self.wfile.write(piece)
        if kind == "cut_response":
            raise Cut

    def pause(self, seconds: float) -> None:
        if self.server.site.closing.wait(seconds):
            raise Cut

    def cut(self, reset: bool) -> None:
        self.close_connection = True
        if reset:
            linger_on_for_0_s = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_on_for_0_s)
            os.close(self.connection.detach())  # the server's own way to close would send FIN first

    def log_message(self, format: str, *args: Any) -> None:
        """The log is in memory, for tests."""


def quota_refusal(per_hour: int, minutes: int, retry_after_s: int | None = None) -> Refused:
    """The words of the real Hub: services read the time to wait from them, for there is no Retry-After."""
    wait = f"{minutes} minutes" if 1 < minutes < 60 else "1 hour" if minutes >= 60 else "1 minute"
    return Refused(
        429,
        f"You have exceeded the rate limit for repository commits ({per_hour} per hour). You can retry this action in"
        f" about {wait}. If you're a new user, your limits will raise progressively over time. Get in touch with us"
        " if you need access now.",
        retry_after_s=retry_after_s,
    )
