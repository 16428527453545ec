"""An HTTP origin that answers as a script says, byte by byte: for what real servers do not do.

Threads and raw sockets of the standard library only. Each path has a ``Resource``; without a script
it is served honestly (strong entity-tag, Last-Modified, If-Range, If-None-Match, single ranges).
A script is a list of answers for the next requests of a path, one each. What may live here: the origin,
and answers that more than one test file scripts.
"""

from __future__ import annotations

import array
import contextlib
import datetime
import fcntl
import hashlib
import re
import socket
import ssl
import struct
import termios
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

LAST_MODIFIED = "Tue, 02 Jan 2024 03:04:05 GMT"
DATE = "Wed, 03 Jan 2024 03:04:05 GMT"
PIECE = 64 << 10


@dataclass
class Resource:
    """One representation; ``etag`` "" for none, ``None`` for one made of the bytes."""

    body: bytes
    etag: str | None = None
    last_modified: str = LAST_MODIFIED
    media_type: str = "application/octet-stream"

    @property
    def tag(self) -> str:
        if self.etag is not None:
            return self.etag
        return f'"{hashlib.sha256(self.body).hexdigest()[:16]}"'

    def fields(self) -> dict[str, str]:
        fields = {"Date": DATE, "Content-Type": self.media_type}
        if self.tag:
            fields["ETag"] = self.tag
        if self.last_modified:
            fields["Last-Modified"] = self.last_modified
        return fields


@dataclass
class Asked:
    """A request as it came: ``fields`` by lower-case name, ``sent`` the body bytes it got.

    ``sent_at`` is when the last byte went out, ``left_at`` when the other side left (monotonic seconds).
    """

    method: str
    target: str
    fields: dict[str, str]
    status: int = 0
    sent: int = 0
    at: float = field(default_factory=time.monotonic)
    sent_at: float = 0.0
    left_at: float = 0.0

    @property
    def path(self) -> str:
        return urlsplit(self.target).path


@dataclass(frozen=True)
class Answer:
    """One scripted answer.

    ``end``: ``keep`` (the connection goes on), ``close`` (with TLS: after close_notify), ``fin`` (TLS
    ends without close_notify), ``reset`` (RST), ``stall`` (silence until the other side leaves).
    ``cut``: body bytes after which that end comes. ``length``:
    Content-Length that is claimed (``None`` for none). ``pace``: seconds after each ``piece`` bytes.
    ``chunked``: chunked framing, with the last chunk unless cut. ``raw``: all that is sent instead of a
    head and a body, piece by piece, until the other side leaves.
    """

    status: int = 200
    fields: dict[str, str] | tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    end: str = "keep"
    cut: int | None = None
    length: int | None = -1
    pace: float = 0.0
    piece: int = PIECE
    chunked: bool = False
    before_head: float = 0.0
    raw: Callable[[], Iterable[bytes]] | None = None

    def pairs(self) -> Iterable[tuple[str, str]]:
        return self.fields.items() if isinstance(self.fields, dict) else self.fields

    def head(self) -> bytes:
        lines = [f"HTTP/1.1 {self.status} Scripted"]
        lines += [f"{name}: {value}" for name, value in self.pairs()]
        if self.chunked:
            lines.append("Transfer-Encoding: chunked")
        elif self.length == -1 and self.status not in (204, 304):
            lines.append(f"Content-Length: {len(self.body)}")
        elif self.length is not None and self.length >= 0:
            lines.append(f"Content-Length: {self.length}")
        if self.end != "keep" or self.length is None:
            lines.append("Connection: close")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


Script = Answer | Callable[[Asked, Resource], Answer]


def honest(asked: Asked, resource: Resource, **changes: object) -> Answer:
    """Answer as a good file server does; *changes* replace fields of the answer."""
    fields, body = resource.fields() | {"Accept-Ranges": "bytes"}, resource.body
    answer = Answer(200, fields, body)
    tags = asked.fields.get("if-none-match")
    since = asked.fields.get("if-modified-since")
    if tags is not None and resource.tag:
        matches = resource.tag.removeprefix("W/") in [t.strip().removeprefix("W/") for t in tags.split(",")]
    else:
        matches = since is not None and since == resource.last_modified
    if matches:
        answer = Answer(304, fields)
    elif (span := _range(asked, resource)) is not None:
        answer = partial(resource, *span)
    return replace(answer, **changes)


def _range(asked: Asked, resource: Resource) -> tuple[int, int] | None:
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked.fields.get("range", ""))
    condition = asked.fields.get("if-range")
    same = condition is None or (
        condition in (resource.tag, resource.last_modified) and not condition.startswith("W/")
    )
    if match is None or not same:
        return None
    return int(match[1]), int(match[2]) + 1 if match[2] else len(resource.body)


def partial(resource: Resource, first: int, stop: int | None = None, **changes: object) -> Answer:
    """Answer 206 with bytes [first, stop) of *resource*, or 416 beyond its end."""
    total = len(resource.body)
    stop = total if stop is None else min(stop, total)
    fields = resource.fields()
    if first >= total:
        answer = Answer(416, {"Content-Range": f"bytes */{total}"}, b"<html>no such range</html>")
    else:
        fields["Content-Range"] = f"bytes {first}-{stop - 1}/{total}"
        answer = Answer(206, fields, resource.body[first:stop])
    return replace(answer, **changes)


def cut(at: int, end: str = "reset", **changes: object) -> Script:
    """An honest answer that breaks off after *at* bytes of its body."""
    return lambda asked, resource: honest(asked, resource, cut=at, end=end, **changes)


def start_of(asked: Asked) -> int:
    """Where the asked range begins, 0 without one."""
    match = re.match(r"bytes=(\d+)-", asked.fields.get("range", ""))
    return int(match[1]) if match else 0


class Origin:
    """The server; ``requests`` is all it was asked, in order."""

    def __init__(self, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[Asked] = []
        self._resources: dict[str, Resource] = {}
        self._scripts: dict[str, deque[Script]] = defaultdict(deque)
        self._defaults: dict[str, Script] = {}
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._closing = threading.Event()
        self.host = host
        self._tls = tls
        self._socket = socket.create_server((host, 0), backlog=128)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    # -- what it serves --------------------------------------------------------------------

    def put(self, path: str, body: bytes, *script: Script, default: Script = honest, **kind: str) -> str:
        """Serve *body* at *path*, after the answers of *script*; return the URL."""
        with self._lock:
            self._resources[path] = Resource(body, **kind)
            self._scripts[path] = deque(script)
            self._defaults[path] = default
        return self.url(path)

    def script(self, path: str, *script: Script) -> None:
        """Replace the script of *path*."""
        with self._lock:
            self._scripts[path] = deque(script)

    def url(self, path: str) -> str:
        return f"http{'s' if self._tls else ''}://{self.host}:{self.port}{path}"

    def asked(self, path: str) -> list[Asked]:
        """Return the requests for *path*."""
        with self._lock:
            return [request for request in self.requests if request.path == path]

    def forget(self) -> None:
        """Start a new record of requests."""
        with self._lock:
            self.requests.clear()

    def close(self) -> None:
        self._closing.set()
        self._socket.close()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    # -- how it does -----------------------------------------------------------------------

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open.add(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        if self._tls is not None:
            try:
                connection = self._tls.wrap_socket(connection, server_side=True)
            except OSError:
                return
        stream = connection.makefile("rb")
        try:
            while (asked := _read_request(stream)) is not None:
                answer = self._answer(asked)
                asked.status = answer.status
                try:
                    _send(connection, answer, asked)
                    if answer.end == "stall":
                        _until_left(connection, self._closing)
                finally:
                    asked.left_at = time.monotonic()
                if answer.end != "keep" or answer.length is None:
                    _finish(connection, answer.end)
                    return
        except OSError:
            pass  # the other side left
        finally:
            with self._lock:
                self._open.discard(connection)
            stream.close()
            connection.close()

    def _answer(self, asked: Asked) -> Answer:
        with self._lock:
            self.requests.append(asked)
            resource = self._resources.get(asked.path)
            if resource is None:
                return Answer(404, {"Content-Type": "text/plain"}, b"not here")
            script = self._scripts[asked.path]
            step = script.popleft() if script else self._defaults[asked.path]
        return step if isinstance(step, Answer) else step(asked, resource)


@dataclass
class OriginRecord:
    """The requests that an ``Origin`` got, which can be pickled and outlive it."""

    root: str
    requests: list[Asked]

    @classmethod
    def by(cls, origin: Origin) -> OriginRecord:
        return cls(origin.url(""), list(origin.requests))

    def url(self, path: str) -> str:
        return self.root + path

    def asked(self, path: str) -> list[Asked]:
        return [request for request in self.requests if request.path == path]


def _read_request(stream) -> Asked | None:
    line = stream.readline().decode("latin-1").split()
    if len(line) != 3:
        return None
    fields = {}
    while (raw := stream.readline().decode("latin-1").strip()) != "":
        name, _, value = raw.partition(":")
        fields[name.lower()] = value.strip()
    stream.read(int(fields.get("content-length", 0)))
    return Asked(line[0], line[1], fields)


def _send(connection: socket.socket, answer: Answer, asked: Asked) -> None:
    time.sleep(answer.before_head)
    if answer.raw is not None:
        for piece in answer.raw():
            connection.sendall(piece)
            asked.sent += len(piece)
        return
    connection.sendall(answer.head())
    asked.sent_at = time.monotonic()
    if asked.method == "HEAD":
        return
    body = answer.body if answer.cut is None else answer.body[: answer.cut]
    size = answer.piece if answer.pace else PIECE
    for at in range(0, len(body), size):
        piece = body[at : at + size]
        connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece) if answer.chunked else piece)
        asked.sent += len(piece)
        asked.sent_at = time.monotonic()
        if at + size < len(body):
            time.sleep(answer.pace)
    if answer.chunked and answer.cut is None:
        connection.sendall(b"0\r\n\r\n")


def _until_left(connection: socket.socket, closing: threading.Event) -> None:
    connection.settimeout(0.1)
    while not closing.is_set():
        with contextlib.suppress(TimeoutError):
            if not connection.recv(1024):
                return


def _finish(connection: socket.socket, end: str) -> None:
    if end == "reset":
        _drained(connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    elif end == "close" and isinstance(connection, ssl.SSLSocket):
        connection.settimeout(2)
        with contextlib.suppress(OSError):  # the other side need not answer the close_notify
            connection.unwrap()
    elif end in ("close", "fin"):
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(2)
        while connection.recv(65536):
            pass


def self_signed(folder: Path) -> ssl.SSLContext:
    """Return a server's context with a certificate of its own, made in *folder*."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now - day, now + day)
    pem = made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    pem += key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = folder / "server.pem"
    path.write_bytes(pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context


def _drained(connection: socket.socket) -> None:
    """Wait until the kernel has handed over what was sent: a reset would throw it away."""
    waiting = array.array("i", [1])
    deadline = time.monotonic() + 2
    while waiting[0] and time.monotonic() < deadline:
        fcntl.ioctl(connection, termios.TIOCOUTQ, waiting)
        time.sleep(0.001)
    time.sleep(0.05)  # and the receiver time to read it


def put_files(origin: Origin, count: int) -> dict[str, bytes]:
    """Put *count* files on the origin, every tenth with the bytes of another; return them by URL."""
    bodies = {n: b"%d " % (n - n % 10 if n % 10 == 9 else n) * 500 for n in range(count)}
    return {origin.put(f"/{number}.pdf", body): body for number, body in bodies.items()}
