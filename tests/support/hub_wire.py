"""The wire of the loopback Hub: requests and answers over HTTP, a log of them, and faults carried out."""

import json
import os
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import parse_qsl, urlsplit

from tests.support.hub_faults import Entry, Fault, Faults

PIECE_BYTES = 1 << 16
CONTROL = "/_control/"


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
        piece = self._stream.read1(min(size, self._left)) if self._left else b""  # pyright: ignore[reportAttributeAccessIssue]
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


def as_json(data: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(status, json.dumps(data).encode(), headers)


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
        if isinstance(sys.exception(), ConnectionError):  # the client was killed between two requests
            return
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
