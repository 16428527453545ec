"""A small web server over generated documents, so that the example needs no network.

``python -m documents.origin FOLDER`` makes the documents if they are not there, serves them on 127.0.0.1,
prints its URL and ends when its standard input does: it cannot outlive whoever started it.

It answers as a good file server does: strong entity-tags, dates, conditional requests, single ranges.
"""

import argparse
import functools
import hashlib
import html
import itertools
import mimetypes
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
from email.utils import formatdate, parsedate_to_datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit

FIRST_PORT = 27182
MIB = 1024 * 1024
FOLDERS = (
    "",
    "reports/2024",
    "reports/2025",
    "reports/2025/annexes",
    "data",
    "data/raw",
    "images",
    "Œuvres complètes",
)
WORDS = (
    "annual report",
    "budget",
    "résumé",
    "minutes of the meeting",
    "survey",
    "Größe",
    "map",
    "appendix",
    "論文",
    "index",
)
EXTENSIONS = ("pdf", "pdf", "pdf", "txt", "csv", "bin", "zip", "png", "json")


# -- the documents ---------------------------------------------------------------------------


def generate(root: Path, seed: int = 2) -> None:
    """Fill ``root`` with the documents if it does not exist; the same bytes each time.

    They are made in a temporary folder that is renamed at the end, so ``root`` is whole or absent.
    """
    if root.is_dir():
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix="making-", dir=root.parent))
    try:
        for path, content in _documents(random.Random(seed)):
            target = temporary / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            os.utime(target, (1_750_000_000, 1_750_000_000 + len(content) % 86_400))
        temporary.chmod(0o755)
        if not root.is_dir():
            temporary.rename(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _documents(rng: random.Random) -> list[tuple[PurePosixPath, bytes]]:
    """Return path and content of each document: most of them small, some twice under another name."""
    sizes = [1, 2, 8 * MIB, 8 * MIB, *(rng.randint(1 * MIB, 6 * MIB) for _ in range(12))]
    sizes += [int(2 ** rng.uniform(4, 17)) for _ in range(270)]
    documents = [
        (
            PurePosixPath(rng.choice(FOLDERS), f"{rng.choice(WORDS)} {number}.{rng.choice(EXTENSIONS)}"),
            rng.randbytes(size),
        )
        for number, size in enumerate(sizes)
    ]
    copies = [
        (PurePosixPath("copies", f"copy of {path.name}"), content)
        for path, content in rng.sample(documents, 20)
    ]
    plain = [
        (PurePosixPath(name), rng.randbytes(size)) for name, size in (("README", 900), ("data/LICENSE", 1500))
    ]
    return documents + copies + plain


# -- the server ------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _entity_tag(path: Path, *_state: int) -> str:
    """Return the strong entity-tag of a file's content; *_state* tells one content's call from another's."""
    return f'"{hashlib.sha256(path.read_bytes()).hexdigest()[:32]}"'


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD of files and listings below ``root``; everything else is refused."""

    protocol_version = "HTTP/1.1"
    server_version = "documents"
    disable_nagle_algorithm = True
    root: Path

    def do_GET(self) -> None:
        """Answer with the file or the listing at the URL's path."""
        path = self._path()
        if path is None:
            self._answer(HTTPStatus.NOT_FOUND, {"Content-Type": "text/plain"}, b"not found\n")
        elif path.is_file():
            self._file(path)
        elif not urlsplit(self.path).path.endswith("/"):
            self._answer(HTTPStatus.MOVED_PERMANENTLY, {"Location": urlsplit(self.path).path + "/"}, b"")
        else:
            self._answer(HTTPStatus.OK, {"Content-Type": "text/html; charset=utf-8"}, self._listing(path))

    def do_HEAD(self) -> None:
        """Answer as to a GET; the body is left out where it would be sent."""
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Keep quiet: standard error is the crawl's."""

    def _path(self) -> Path | None:
        """Return what the URL names, or None if that is nothing below the root."""
        names = [unquote(name) for name in urlsplit(self.path).path.split("/") if name]
        if any(name in {".", ".."} or "/" in name or "\0" in name for name in names):
            return None
        path = self.root.joinpath(*names).resolve()
        return path if path.is_relative_to(self.root) and path.exists() else None

    def _listing(self, folder: Path) -> bytes:
        """Return a page that links to everything in the folder, as file servers do."""
        names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
        title = html.escape(unquote(urlsplit(self.path).path))
        links = "".join(
            f'<li><a href="{quote(name)}">{html.escape(name)}</a></li>\n' for name in ["../", *names]
        )
        return f'<!doctype html><meta charset="utf-8"><title>{title}</title>\n<ul>\n{links}</ul>\n'.encode()

    def _file(self, path: Path) -> None:
        """Answer for one state of a file: 200, 206, 304 or 416 (RFC 9110 §13.2.2, §14.2)."""
        stat = path.stat()
        tag = _entity_tag(path, stat.st_mtime_ns, stat.st_size)
        fields = {
            "Content-Type": mimetypes.guess_type(path.name)[0] or "application/octet-stream",
            "ETag": tag,
            "Last-Modified": formatdate(stat.st_mtime, usegmt=True),
            "Accept-Ranges": "bytes",
        }
        if self._not_modified(tag, int(stat.st_mtime)):
            self._answer(HTTPStatus.NOT_MODIFIED, fields, None)
            return
        wanted = self._range(fields, stat.st_size)
        if wanted is None:
            self._answer(HTTPStatus.OK, fields, path, range(stat.st_size))
        elif wanted:
            fields["Content-Range"] = f"bytes {wanted[0]}-{wanted[-1]}/{stat.st_size}"
            self._answer(HTTPStatus.PARTIAL_CONTENT, fields, path, wanted)
        else:
            fields["Content-Range"] = f"bytes */{stat.st_size}"
            self._answer(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, fields, b"")

    def _not_modified(self, tag: str, modified: int) -> bool:
        """Tell whether the client has this state already; an entity-tag goes before a date."""
        tags = self.headers.get("If-None-Match")
        if tags is not None:
            return tags.strip() == "*" or tag in re.findall(r'"[^"]*"', tags)
        try:
            since = parsedate_to_datetime(self.headers.get("If-Modified-Since", "")).timestamp()
        except ValueError:
            return False
        return modified <= since

    def _range(self, fields: dict[str, str], size: int) -> range | None:
        """Return the positions asked for: None for all of them, empty if there are none such."""
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "").strip(), re.ASCII)
        condition = self.headers.get("If-Range")
        if self.command != "GET" or match is None or match.group(0) == "bytes=-":
            return None
        if condition is not None and condition not in {fields["ETag"], fields["Last-Modified"]}:
            return None
        first, last = match.groups()
        if not first:
            return range(max(0, size - int(last)), size)
        if last and int(last) < int(first):
            return None
        return range(int(first), min(int(last) + 1 if last else size, size))

    def _answer(
        self,
        status: HTTPStatus,
        fields: dict[str, str],
        body: bytes | Path | None,
        positions: range = range(0),
    ) -> None:
        """Send a head and, unless the method is HEAD, the body: bytes, or those positions of a file."""
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name, value)
        if body is not None:
            self.send_header("Content-Length", str(len(positions if isinstance(body, Path) else body)))
        self.end_headers()
        if self.command == "HEAD" or body is None:
            return
        if isinstance(body, bytes):
            self.wfile.write(body)
            return
        with body.open("rb") as file:
            for start in range(positions.start, positions.stop, 256 * 1024):
                file.seek(start)
                self.wfile.write(file.read(min(256 * 1024, positions.stop - start)))


class Server(ThreadingHTTPServer):
    """One thread a connection; a client that goes away is no error."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: socket.socket | tuple[bytes, socket.socket], client_address: Any) -> None:
        """Say only what is not the client's hanging up."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def listen(root: Path, wanted: int) -> Server:
    """Return a server on the first free port: the one wanted, the usual ones, any."""
    handler = type("RootedHandler", (Handler,), {"root": root.resolve()})
    for port in itertools.chain([wanted], range(FIRST_PORT, FIRST_PORT + 50)):
        try:
            return Server(("127.0.0.1", port), handler)
        except OSError:
            continue
    return Server(("127.0.0.1", 0), handler)


def main() -> None:
    """Make the documents, serve them, print the URL, end with standard input."""
    parser = argparse.ArgumentParser(prog="python -m documents.origin", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="where the documents are, or are to be made")
    parser.add_argument("--port", type=int, default=FIRST_PORT)
    options = parser.parse_args()
    if not sys.stdin.isatty():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the crawl, which ends us when it is done
    generate(options.folder)
    server = listen(options.folder, options.port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_port}/", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
