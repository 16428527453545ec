"""Layer 2: blocking I/O on one store. Knows no Scrapy, no Twisted, no asyncio.

``Storage`` is what the layer above owns: the parts, the blobs and the ledger of one store.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from scrapy_streaming.exceptions import StoreError
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage.blobs import LocalBlobStore
from scrapy_streaming.storage.ledger import Ledger
from scrapy_streaming.storage.parts import PartStore

STORE_FORMAT: Final = 1
#: Filesystems on which SQLite's locks cannot be trusted (ledger.md, SQLite).
NETWORK_FILESYSTEMS: Final = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "9p", "ceph", "glusterfs", "fuse.sshfs", "fuse.glusterfs"}
)


@dataclass(frozen=True, slots=True)
class Storage:
    """The parts, blobs and ledger of one store, opened together.

    ``notes`` are things the user should be told once, in whole sentences.
    """

    parts: PartStore
    blobs: LocalBlobStore
    ledger: Ledger
    store_id: str
    worker_id: str
    notes: tuple[str, ...]
    _worker_file: int

    @classmethod
    def open(cls, settings: StreamingSettings) -> Storage:
        """Return the store that *settings* name, made if it is new.

        Raises ``StoreError`` (not writable, another format, not safe) or ``LedgerError``.
        """
        root, directory = settings.store, settings.directory
        if root is None or directory is None:
            msg = "FILES_STORE must name a local directory"
            raise StoreError(msg)
        notes: list[str] = []
        try:
            root.mkdir(parents=True, exist_ok=True)
            _check_owner(root, notes)
            for folder in (directory, directory / "parts", directory / "quarantine", directory / "workers"):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                _plain_directory(folder)
            store_id = _store_id(directory, fsync=settings.fsync)
            worker_id, worker_file = _register_worker(directory / "workers")
            blobs = LocalBlobStore(
                root, directory / "quarantine", fsync=settings.fsync, link_mode=settings.link_mode
            )
        except OSError as error:
            msg = f"FILES_STORE={str(root)!r} cannot be used: {error.strerror} ({error.filename})"
            raise StoreError(msg, reason="store-not-writable") from error
        ledger = Ledger.open(
            _ledger_path(settings.database_url, directory),
            store_id=store_id,
            worker_id=worker_id,
            lease_seconds=settings.lease_seconds,
            max_attempts=settings.max_attempts,
            fsync=settings.fsync,
        )
        for gone in _dead_workers(directory / "workers", worker_id):
            ledger.forget_worker(gone).result()
            with suppress(FileNotFoundError):
                (directory / "workers" / gone).unlink()
        parts = PartStore(
            directory / "parts",
            fsync=settings.fsync,
            checkpoint_bytes=settings.checkpoint_bytes,
            checkpoint_seconds=settings.checkpoint_seconds,
        )
        return cls(parts, blobs, ledger, store_id, worker_id, tuple(notes), worker_file)

    def close(self) -> None:
        """Finish what is queued for the ledger and let go of everything."""
        self.ledger.close()
        self.parts.close()
        self.blobs.close()
        with suppress(FileNotFoundError):
            (self.parts.directory.parent / "workers" / self.worker_id).unlink()
        os.close(self._worker_file)


def _check_owner(root: Path, notes: list[str]) -> None:
    mode = root.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        notes.append(f"{root} is writable by everyone: anybody on this machine can plant files in it")


def _plain_directory(folder: Path) -> None:
    if not stat.S_ISDIR(folder.lstat().st_mode):
        msg = f"{folder} is a link; nothing is written through it"
        raise StoreError(msg, reason="store-unsafe")


def _store_id(directory: Path, *, fsync: bool) -> str:
    """Return the store's identity, made by whoever comes first (storage rule 1)."""
    path = directory / "store.json"
    if not os.path.lexists(path):
        temporary = directory / f"store.{secrets.token_hex(8)}.tmp"
        temporary.write_text(json.dumps({"format": STORE_FORMAT, "store_id": secrets.token_hex(16)}) + "\n")
        if fsync:
            _sync(temporary)
        with suppress(FileExistsError):
            os.link(temporary, path)
        temporary.unlink()
        if fsync:
            _sync(directory)
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(fd, "rb") as stream:
        text = stream.read()
    try:
        document = json.loads(text)
        number, store_id = document["format"], document["store_id"]
    except (ValueError, KeyError, TypeError) as error:
        msg = f"{path} is damaged: restore it from a backup, or move it away to have a new one made"
        raise StoreError(msg, reason="store-format") from error
    if number != STORE_FORMAT:
        msg = f"{path} says store format {number}, this version writes {STORE_FORMAT}: install the version that made it"
        raise StoreError(msg, reason="store-format")
    return str(store_id)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _register_worker(folder: Path) -> tuple[str, int]:
    """Return a new worker's id and a descriptor that keeps its file locked while it lives."""
    worker_id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(8)}"
    fd = os.open(folder / worker_id, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return worker_id, fd


def _dead_workers(folder: Path, mine: str) -> list[str]:
    """Return the workers of this machine whose lock nobody holds any more.

    Only saves the wait for their leases to end; correctness rests on fences alone.
    """
    dead = []
    for name in os.listdir(folder):
        if name == mine or not name.startswith(f"{socket.gethostname()}-"):
            continue
        try:
            fd = os.open(folder / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            dead.append(name)
        finally:
            os.close(fd)
    return dead


def _ledger_path(url: str | None, directory: Path) -> Path:
    path = directory / "ledger.sqlite3" if url is None else Path(url.removeprefix("sqlite:///")).absolute()
    kind = filesystem_of(path.parent)
    if kind in NETWORK_FILESYSTEMS:
        msg = (
            f"{path} is on {kind}, where SQLite's locks cannot be trusted: "
            "set STREAMING_DATABASE_URL to sqlite:///PATH on a local disk"
        )
        raise StoreError(msg, reason="store-unsafe")
    return path


def filesystem_of(path: Path, mountinfo: str | None = None) -> str | None:
    """Return the type of the filesystem *path* is on, ``None`` if the system does not say."""
    if mountinfo is None:
        try:
            mountinfo = Path("/proc/self/mountinfo").read_text()
        except OSError:
            return None
    best, kind = -1, None
    resolved = path.resolve()
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        mount = left.split(" ")[4].encode().decode("unicode_escape")
        if len(mount) > best and resolved.is_relative_to(mount):
            best, kind = len(mount), right.split(" ")[0]
    return kind
