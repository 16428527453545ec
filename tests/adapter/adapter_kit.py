"""What the tests of ``scrapy_streaming.integration`` share: one GET by each library, and bytes."""

from __future__ import annotations

import hashlib
import random
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import requests
import urllib3
from support.origin import Origin

from scrapy_streaming import integration
from scrapy_streaming.exceptions import StreamingError
from scrapy_streaming.integration import ResumeDecision, StreamMetrics

LIBRARIES = ("httpx", "requests", "urllib", "urllib3")
CLIENTS = ("httpx", "requests", "urllib")
KIB = 1024
BODY = random.Random(7).randbytes(300 * KIB)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


_open: dict[str, Any] = {}
_TLS = ssl.create_default_context()


def client_of(library: str) -> Any:
    """Return what ``download`` makes its requests by: one for each test."""
    if library not in _open:
        makes: dict[str, Any] = {
            "httpx": lambda: httpx.Client(verify=_TLS),
            "requests": requests.Session,
            "urllib3": urllib3.PoolManager,
        }
        _open[library] = makes.get(library, lambda: None)()
    return _open[library]


def close_clients() -> None:
    while _open:
        _, client = _open.popitem()
        for close in ("close", "clear"):
            if hasattr(client, close):
                getattr(client, close)()
                break


def ask(library: str, url: str, headers: Mapping[str, str] | None = None) -> Any:
    """Return the library's response to a GET, its body unread."""
    fields, client = dict(headers or {}), client_of(library)
    match library:
        case "httpx":
            return client.send(client.build_request("GET", url, headers=fields), stream=True)
        case "requests":
            return client.get(url, headers=fields, stream=True, timeout=10)
        case "urllib3":
            return client.request("GET", url, headers=fields, preload_content=False)
        case _:
            try:
                return urllib.request.urlopen(urllib.request.Request(url, headers=fields), timeout=10)
            except urllib.error.HTTPError as error:
                return error


def decide(part: Path, **how: Any) -> ResumeDecision:
    decision = integration.try_streaming_resume_decision(None, part, **how)
    assert decision is not None
    return decision


def once(library: str, url: str, part: Path, **how: Any) -> StreamMetrics:
    """Decide, ask, receive."""
    metrics = integration.try_streaming_io(ask(library, url, decide(part).headers), part, **how)
    assert metrics is not None
    return metrics


def whole(library: str, url: str, part: Path) -> StreamMetrics:
    """Decide, ask and receive until the part is whole."""
    for _ in range(10):
        try:
            return once(library, url, part)
        except StreamingError:
            continue
    raise AssertionError(f"{url} was never whole")


def ranges(origin: Origin) -> list[str]:
    return [asked.fields.get("range", "") for asked in origin.requests]


class Cutter:
    """Forwards connections to *port*; the first ones are cut after *cuts* bytes of answer, one each.

    ``had`` counts the bytes of answers that were forwarded, heads and all.
    """

    def __init__(self, port: int, *cuts: int) -> None:
        self.had: list[int] = []
        self._port = port
        self._cuts = list(cuts)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            self.had.append(0)
            limit = self._cuts.pop(0) if self._cuts else None
            threading.Thread(
                target=self._forward, args=(client, len(self.had) - 1, limit), daemon=True
            ).start()

    def _forward(self, client: socket.socket, number: int, limit: int | None) -> None:
        with client, socket.create_connection(("127.0.0.1", self._port)) as server, suppress(OSError):
            threading.Thread(target=_pump, args=(client, server), daemon=True).start()
            while data := server.recv(65536):
                client.sendall(data)
                self.had[number] += len(data)
                if limit is not None and self.had[number] >= limit:
                    client.shutdown(socket.SHUT_RDWR)
                    return


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
