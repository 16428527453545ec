"""A proxy in front of PostgreSQL that cuts connections around a COMMIT, or refuses them.

What may live here: the proxy, and what it must know of PostgreSQL's protocol for that.
"""

from __future__ import annotations

import contextlib
import re
import selectors
import socket
import struct
import threading
from typing import Any, Literal

from support.postgres import LOOPBACK, quiet_port

# A simple query, or one to be parsed, with a statement that begins so; READ COMMITTED is none.
COMMIT = re.compile(rb"(?:Q.{4}|P.{4}[^\0]*\0)(?:.*;)?\s*(?i:COMMIT)\b", re.DOTALL)
# CommandComplete, which is sent after the fact, or ReadyForQuery, which follows an error too.
ANSWER = re.compile(rb"C\0\0\0.(?:COMMIT|ROLLBACK)[^\0]*\0|Z\0\0\0\x05", re.DOTALL)
ENCRYPTION_REQUESTS = (
    80877103,
    80877104,
)  # TLS and GSSAPI: refused by this server, then comes the real start
ABORT = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST


class CuttingProxy:
    """Forwards PostgreSQL's protocol to *target_port*, and cuts connections (RST both ways) on order.

    With ``cut_before_commit = n`` the n-th COMMIT from now on never reaches the server. With
    ``cut_after_commit = n`` it takes effect, and the client gets no answer: the server's is awaited and
    dropped. Both count all connections together, cut once, and are 0 again then. While ``down`` is true
    connections are refused. ``commits`` and ``cuts`` say how often either happened.

    A COMMIT is known by its SQL, whichever protocol sends it; one that is sent while the answer to an earlier
    Sync is still under way would be taken for answered too early, which neither psycopg nor SQLAlchemy does.
    """

    def __init__(self, target_port: int) -> None:
        self.cut_before_commit = 0
        self.cut_after_commit = 0
        self.commits = 0
        self.cuts = 0
        self.port = quiet_port()
        self.target_port = target_port
        self._lock = threading.Lock()
        self._links: set[_Link] = set()
        self._listener: socket.socket | None = None
        self._listen()

    @property
    def down(self) -> bool:
        """Whether the database is unreachable: new connections are refused, those there were are cut."""
        return self._listener is None

    @down.setter
    def down(self, down: bool) -> None:
        if down:
            self.close()
        elif self._listener is None:
            self._listen()

    def close(self) -> None:
        """Cut all connections, and listen no longer."""
        with self._lock:
            listener, self._listener = self._listener, None
            links = list(self._links)
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # closing alone does not end accept() in the thread
            listener.close()
            self._acceptor.join()
        for link in links:
            link.cut()
        for link in links:
            link.thread.join()

    def next_cut(self) -> Literal["before", "after", ""]:
        """Count one COMMIT; return what to do with it."""
        with self._lock:
            self.commits += 1
            before, after = self.cut_before_commit == 1, self.cut_after_commit == 1
            self.cut_before_commit = max(self.cut_before_commit - 1, 0)
            self.cut_after_commit = max(self.cut_after_commit - 1, 0)
        return "before" if before else "after" if after else ""

    def cutting(self) -> None:
        """Count a cut; before the client sees it, so that a test that does can rely on the number."""
        with self._lock:
            self.cuts += 1

    def ended(self, link: _Link) -> None:
        with self._lock:
            self._links.discard(link)

    def _listen(self) -> None:
        self._listener = socket.create_server((LOOPBACK, self.port))
        self._acceptor = threading.Thread(target=self._accept, args=(self._listener,), daemon=True)
        self._acceptor.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with self._lock:
                if self._listener is not listener:
                    _abort(client)
                    return
                link = _Link(self, client)
                self._links.add(link)
                link.thread.start()


class _Cut(Exception):
    """This connection is to end by RST."""


class _Link:
    """A client's connection and its connection to the server; one thread reads both, in order."""

    def __init__(self, proxy: CuttingProxy, client: socket.socket) -> None:
        self.thread = threading.Thread(target=self._run, daemon=True)
        self._proxy = proxy
        self._client = client
        self._server = socket.socket()
        self._cut = False
        self._buffer = bytearray()
        self._started = False
        self._withheld: bytearray | None = None

    def cut(self) -> None:
        """Have the thread cut it; what it waits for ends, and neither peer sees more than the RST."""
        self._cut = True
        for end in (self._client, self._server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RD)

    def _run(self) -> None:
        cut = False
        try:
            self._server.connect((LOOPBACK, self._proxy.target_port))
            for end in (self._client, self._server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._forward()
        except (_Cut, OSError):
            cut = True
            self._proxy.cutting()
        finally:
            for end in (self._client, self._server):
                _abort(end) if cut else end.close()
            self._proxy.ended(self)

    def _forward(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._client, selectors.EVENT_READ)
            selector.register(self._server, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    end: Any = key.fileobj
                    data = end.recv(65536)
                    if self._cut:
                        raise _Cut
                    if not data:
                        return
                    if end is self._server:
                        self._to_client(data)
                    else:
                        self._buffer += data
                        self._to_server()

    def _to_server(self) -> None:
        while message := self._message():
            cut = self._proxy.next_cut() if COMMIT.match(message) else ""
            if cut == "before":
                raise _Cut
            if cut == "after":
                self._withheld = bytearray()
            self._server.sendall(message)

    def _to_client(self, data: bytes) -> None:
        if self._withheld is None:
            self._client.sendall(data)
            return
        # the answer is awaited: an RST at once could take the COMMIT away before the server has read it
        self._withheld += data
        if ANSWER.search(self._withheld):
            raise _Cut

    def _message(self) -> bytes:
        """Take the next whole message out of the buffer; empty if there is none."""
        typed = int(self._started)  # the first messages of a connection have no type before their length
        if len(self._buffer) < typed + 4:
            return b""
        size = typed + int.from_bytes(self._buffer[typed : typed + 4])
        if len(self._buffer) < size:
            return b""
        message = bytes(self._buffer[:size])
        del self._buffer[:size]
        if not self._started:
            self._started = int.from_bytes(message[4:8]) not in ENCRYPTION_REQUESTS
        return message


def _abort(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
    end.close()
