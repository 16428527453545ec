"""Layer 2: blocking I/O on one store. Knows no Scrapy, no Twisted, no asyncio.

``Storage`` is what the layer above owns: the parts, the blobs and the ledger of one store.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import json
import os
import re
import secrets
import socket
import stat
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from scrapy_streaming.exceptions import LedgerError, StoreError, WriteFailed
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage.blobs import LocalBlobStore
from scrapy_streaming.storage.named import NamedFiles
from scrapy_streaming.storage.parts import PartStore
from scrapy_streaming.storage.planted import planted_kind, refuse_planted
from scrapy_streaming.storage.unrecorded import Unrecorded

if TYPE_CHECKING:  # at run time SQLAlchemy is imported only where a ledger is opened
    from scrapy_streaming.storage.ledger import Ledger, LedgerLook, Standing

STORE_FORMAT: Final = 1
#: Filesystems on which SQLite's locks cannot be trusted (ledger.md, SQLite).
NETWORK_FILESYSTEMS: Final = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "9p", "ceph", "glusterfs", "lustre", "beegfs", "gpfs"}
    | {"fuse.sshfs", "fuse.glusterfs", "fuse.s3fs", "fuse.rclone", "fuse.gcsfuse", "fuse.davfs"}
)
#: What a crawl says when it finds an older copy in the ledger's place (I16).
PUT_BACK: Final = (
    "an older copy of the ledger was put back (ledger-put-back): what it calls done is asked of the server "
    "again, and `scrapy streaming gc` refuses until the store has been read, which a crawl does beside its "
    "work and `scrapy streaming rebuild` at once"
)
#: What is said once of a ``store.json`` that a power cut left empty or cut (storage rule 13c).
MADE_ANEW: Final = "{path} was damaged (store-json) and was made anew from {source}"
#: Where the identity of such a store comes from: its ledger, or nowhere, and its blobs are to be read.
_FROM_LEDGER, _FROM_NOTHING = "the ledger", "nothing: the store is read for what it holds"
#: What a filesystem without hard links says of one.
_NO_LINK = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})


class Use(enum.Enum):
    """What a store is opened for: only a crawl makes one, only ``rebuild`` a ledger for an old one.

    A look neither raises the epoch nor notes that an older copy of the ledger was put back.
    """

    CRAWL = enum.auto()
    LOOK = enum.auto()
    REBUILD = enum.auto()


@dataclass(frozen=True, slots=True)
class Identity:
    """What ``store.json`` says: the store's id, its ledger's (``None``: it had none yet), the epoch.

    The ledger's id is there so that a ledger which is gone is missed, not silently begun anew; the
    epoch, which the ledger has too, so that an older copy of it is noticed (I16). ``unrecorded``: a
    crawl without the ledger stored what it does not know.
    """

    store_id: str
    ledger_id: str | None = None
    epoch: int = 0
    unrecorded: bool = False


@dataclass(frozen=True, slots=True)
class Storage:
    """The parts, blobs and ledger of one store, opened together.

    ``jobs`` has the verbs that a download needs: the ledger, or what stands in its place while it is
    off. ``notes`` are things the user should be told once, in whole sentences. ``kept`` is how many
    bytes the parts found at the start vouch for, by job key.
    """

    parts: PartStore
    blobs: LocalBlobStore
    jobs: Ledger | Unrecorded
    store_id: str
    worker_id: str
    notes: tuple[str, ...]
    kept: dict[str, int]
    _use: Use
    _held: ExitStack

    @classmethod
    def open(cls, settings: StreamingSettings, use: Use = Use.CRAWL) -> Storage:
        """Return the store that *settings* name, made if it is new and *use* is a crawl's.

        Raises ``StoreError`` (not writable, another format, not safe, not there) or ``LedgerError``
        (``ledger-off`` for any use but a crawl's while it is switched off); nothing is left open then.
        """
        root, directory = settings.store, settings.directory
        if root is None or directory is None:
            msg = "FILES_STORE must name a local directory"
            raise StoreError(msg)
        if use is not Use.CRAWL and settings.why_no_ledger is not None:
            raise _ledger_off(settings.why_no_ledger)
        check_files(settings)
        found = os.path.lexists(directory / "store.json") or _has_ledger(settings)
        if use is not Use.CRAWL and not found:
            msg = f"FILES_STORE={str(root)!r} holds no store yet: nothing was crawled into it"
            raise StoreError(msg, reason="store-missing")
        with ExitStack() as held, ExitStack() as unfinished:
            try:
                notes = _make_folders(root, directory, fsync=settings.fsync)
                identity, source = _identity(settings, directory, use)
                if source:
                    notes += (MADE_ANEW.format(path=directory / "store.json", source=source),)
                worker_id = _register_worker(directory / "workers", held)
                unfinished.callback((directory / "workers" / worker_id).unlink, missing_ok=True)
                blobs = _blob_store(settings, root, directory)
                held.callback(blobs.close)
                parts = PartStore(
                    directory / "parts",
                    fsync=settings.fsync,
                    checkpoint_bytes=settings.checkpoint_bytes,
                    checkpoint_seconds=settings.checkpoint_seconds,
                    adopt=_is_local(filesystem_of(directory)),
                    fenced=settings.why_no_ledger is None,
                )
                held.callback(parts.close)
            except OSError as error:
                msg = f"FILES_STORE={str(root)!r} cannot be used: {error.strerror} ({error.filename})"
                raise StoreError(msg, reason="store-not-writable") from error
            kept = parts.lengths()
            jobs: Ledger | Unrecorded
            if settings.why_no_ledger is None:
                jobs = ledger = _open_ledger(settings, directory, identity, worker_id, use)
                held.callback(ledger.close)
                if use is not Use.LOOK:
                    # what store.json says was in the ledger before: this order tells an older ledger apart
                    unread = use is Use.REBUILD or source == _FROM_NOTHING or identity.unrecorded
                    standing = ledger.raise_epoch(identity.epoch, unread=unread).result()
                    _keep_identity(
                        directory, ledger.ledger_id, standing.epoch, fsync=settings.fsync, unrecorded=False
                    )
                    if use is Use.CRAWL and standing.unread and standing.put_back_at is not None:
                        notes += (PUT_BACK,)
                for gone in _dead_workers(directory / "workers", worker_id):
                    ledger.forget_worker(gone).result()
                    with suppress(FileNotFoundError):
                        (directory / "workers" / gone).unlink()
            else:
                jobs = Unrecorded(worker_id, parts.highest_fence)
                _keep_identity(directory, None, identity.epoch, fsync=settings.fsync, unrecorded=True)
            unfinished.pop_all()
            return cls(parts, blobs, jobs, identity.store_id, worker_id, notes, kept, use, held.pop_all())

    @property
    def ledger(self) -> Ledger:
        """The ledger; raises ``LedgerError`` (``ledger-off``) while there is none."""
        if isinstance(self.jobs, Unrecorded):
            raise _ledger_off("it was switched off when the store was opened")
        return self.jobs

    def close(self) -> None:
        """Finish what is queued for the ledger and let go of everything; twice is once.

        What was claimed and not ended is free for the next at once. If the ledger does not take
        that (it is away, or the disk is full), the worker's file stays, and whoever opens the
        store next sees to it.
        """
        with self._held, suppress(LedgerError, WriteFailed, StoreError):
            raised = None
            if isinstance(self.jobs, Unrecorded):  # again: one with a ledger may have opened meanwhile
                _keep_identity(self._directory, None, 0, fsync=self.blobs.fsync, unrecorded=True)
            else:
                freed = self.jobs.forget_worker(self.worker_id)
                raised = self._raise_epoch() if self._use is Use.CRAWL else None
                self.jobs.close()  # waits for a ledger that does not answer a few seconds only
                freed.result()
            (self._directory / "workers" / self.worker_id).unlink(missing_ok=True)
            if raised is not None:
                self._keep_epoch(raised.result())

    def refuse_unknown(self) -> None:
        """Raise ``LedgerError`` if blobs may be there that the ledger does not know.

        ``ledger-behind`` after a crawl without it, ``ledger-put-back`` as ``Ledger.refuse_older`` says.
        """
        if _read_identity(self._directory / "store.json").unrecorded:
            msg = "the store may hold blobs that its ledger does not know: a crawl ran without the ledger"
            raise LedgerError(msg, reason="ledger-behind")
        self.ledger.refuse_older().result()

    @property
    def _directory(self) -> Path:
        return self.parts.directory.parent

    def raise_epoch(self) -> Standing:
        """Raise the epoch, so that a copy of the ledger which was taken before is known for an older one.

        Returns how the ledger stands then. Raises ``LedgerError``, ``StoreError`` or ``WriteFailed``.
        """
        standing = self._raise_epoch().result()
        self._keep_epoch(standing)
        return standing

    def _raise_epoch(self) -> Future[Standing]:
        return self.ledger.raise_epoch(_read_identity(self._directory / "store.json").epoch)

    def _keep_epoch(self, standing: Standing) -> None:
        _keep_identity(self._directory, self.ledger.ledger_id, standing.epoch, fsync=self.blobs.fsync)


def _blob_store(settings: StreamingSettings, root: Path, directory: Path) -> LocalBlobStore:
    """Return where finished bytes go."""
    if not settings.finalization_enabled:
        return NamedFiles(root, directory / "quarantine", fsync=settings.fsync)
    return LocalBlobStore(root, directory / "quarantine", fsync=settings.fsync, link_mode=settings.link_mode)


def _ledger_off(why: str) -> LedgerError:
    """Return the error of what needs a ledger while there is none."""
    return LedgerError(f"no ledger is opened: {why} (ledger-off)", reason="ledger-off")


def check_store(settings: StreamingSettings) -> None:
    """Raise ``StoreError`` for what ``Storage.open`` would refuse and a look can tell; makes nothing."""
    for folder in (settings.store, settings.directory):
        if folder is None:
            continue
        there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            what = "is no directory" if not there.is_dir() else "is not writable"
            msg = f"FILES_STORE={str(settings.store)!r} cannot be used: {there} {what}"
            raise StoreError(msg, reason="store-not-writable")
    check_files(settings)
    if settings.directory is not None and os.path.lexists(settings.directory / "store.json"):
        _identity_found(settings.directory / "store.json")


def check_files(settings: StreamingSettings) -> None:
    """Raise ``StoreError`` if a link, a pipe or the like stands where our files are; opens nothing."""
    directory = settings.directory
    if directory is None:
        return
    ours = [directory / name for name in ("store.json", "store.lock", "maintenance.lock")]
    refuse_planted(*ours)
    ledger = None if settings.why_no_ledger is not None else ledger_file(settings, directory)
    if ledger is not None:
        from scrapy_streaming.storage.ledger.sqlite import files_of

        refuse_planted(*files_of(ledger))


def look_at_ledger(settings: StreamingSettings) -> LedgerLook:
    """Return a look at the ledger of the store that *settings* name; nothing is made or changed.

    Raises ``StoreError`` or ``LedgerError`` as ``Storage.open`` does for a look.
    """
    root, directory = settings.store, settings.directory
    if root is None or directory is None:
        msg = "FILES_STORE must name a local directory"
        raise StoreError(msg)
    if settings.why_no_ledger is not None:
        raise _ledger_off(settings.why_no_ledger)
    from scrapy_streaming.storage.ledger import LedgerLook, database_of

    check_files(settings)
    if not os.path.lexists(directory / "store.json") and not _has_ledger(settings):
        msg = f"FILES_STORE={str(root)!r} holds no store yet: nothing was crawled into it"
        raise StoreError(msg, reason="store-missing")
    identity = _identity_found(directory / "store.json")
    file = ledger_file(settings, directory)
    if file is not None and not file.exists():
        msg = f"there is no ledger {file}"
        raise LedgerError(msg, reason="ledger-missing")
    return LedgerLook(
        database_of(ledger_url(settings, directory)), None if identity is None else identity.store_id
    )


def _make_folders(root: Path, directory: Path, *, fsync: bool) -> tuple[str, ...]:
    """Make what is missing of the store, durably; return what the user should be told."""
    if root.resolve() == directory.resolve():
        msg = f"STREAMING_DIR={str(directory)!r} is FILES_STORE itself: it needs a directory of its own"
        raise StoreError(msg, reason="store-unsafe")
    notes: list[str] = []
    _make(root, 0o777, fsync=fsync)
    _check_owner(root, notes)
    for folder in (directory, directory / "parts", directory / "quarantine", directory / "workers"):
        _make(folder, 0o700, fsync=fsync)
        _plain_directory(folder)
    return tuple(notes)


def _make(folder: Path, mode: int, *, fsync: bool) -> None:
    """Make a directory and those above it, each durable in its parent (storage rule 11)."""
    if folder.is_dir():
        return
    if folder != folder.parent:
        _make(folder.parent, 0o777, fsync=fsync)
    folder.mkdir(mode=mode, exist_ok=True)
    if fsync:
        with suppress(PermissionError):  # written to, but not ours to read
            _sync(folder.parent)


def _check_owner(root: Path, notes: list[str]) -> None:
    mode = root.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        notes.append(f"{root} is writable by everyone: anybody on this machine can plant files in it")


def _plain_directory(folder: Path) -> None:
    if not stat.S_ISDIR(folder.lstat().st_mode):
        msg = f"{folder} is {planted_kind(folder) or 'a file'}; nothing is written through it"
        raise StoreError(msg, reason="store-unsafe")


def _identity(settings: StreamingSettings, directory: Path, use: Use) -> tuple[Identity, str]:
    """Return the store's identity, and what it was made anew from if its file was damaged, else ``""``.

    A new store's is made by whoever comes first (storage rule 1); one that a power cut damaged is
    that of the ledger again, or a new one where there is no ledger (storage rule 13c). A look writes nothing.
    """
    path = directory / "store.json"
    if not os.path.lexists(path) and not _has_ledger(settings):
        _write_identity(directory, Identity(secrets.token_hex(16)), fsync=settings.fsync)
    if (found := _identity_found(path)) is not None:
        return found, ""
    with _turn(directory / "store.lock"):
        if (found := _identity_found(path)) is not None:  # another process made it meanwhile
            return found, ""
        made, source = _made_anew(settings, directory, use)
        if use is not Use.LOOK:
            _write_identity(directory, made, fsync=settings.fsync, over=True)
    return made, source


def _has_ledger(settings: StreamingSettings) -> bool:
    """Whether a ledger stands in the store's own folder: then a ``store.json`` was there, too."""
    if settings.database_url is not None or settings.directory is None:
        return False
    return (settings.directory / "ledger.sqlite3").is_file()


def _made_anew(settings: StreamingSettings, directory: Path, use: Use) -> tuple[Identity, str]:
    """Return the identity for a store whose file was damaged, and what it comes from.

    Raises ``LedgerError`` for a ledger that cannot be read, unless one is being rebuilt.
    """
    if settings.why_no_ledger is not None:  # what the ledger says of the store is asked when it is on again
        return Identity(secrets.token_hex(16)), _FROM_NOTHING
    from scrapy_streaming.storage.ledger import recorded_identity

    try:
        recorded = recorded_identity(ledger_url(settings, directory))
    except LedgerError as error:
        if error.reason != "ledger-missing" and use is not Use.REBUILD:
            raise
        recorded = None
    if recorded is None:
        return Identity(secrets.token_hex(16)), _FROM_NOTHING
    return Identity(*recorded), _FROM_LEDGER


def _read_identity(path: Path) -> Identity:
    """Return what ``store.json`` says; raise ``StoreError`` if it cannot be read."""
    found = _identity_found(path)
    if found is None:
        msg = f"{path} is damaged: the next crawl makes it anew"
        raise StoreError(msg, reason="store-format")
    return found


def _identity_found(path: Path) -> Identity | None:
    """Return what ``store.json`` says, ``None`` if it is not there, empty, cut or garbled.

    Raises ``StoreError`` for what is no plain file, cannot be read, or is of another format.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            text = os.read(fd, 1 << 16) if stat.S_ISREG(os.fstat(fd).st_mode) else None
        finally:
            os.close(fd)
    except FileNotFoundError:
        return None
    except OSError as error:
        msg = f"{path} cannot be read: {error.strerror}"
        raise StoreError(msg, reason="store-not-writable") from error
    if text is None:
        msg = f"{path} is no plain file: move it away"
        raise StoreError(msg, reason="store-unsafe")
    try:
        document = json.loads(text)
        number, store_id = document["format"], document["store_id"]
        ledger_id, epoch = document.get("ledger_id"), document.get("epoch", 0)
        unrecorded = document.get("unrecorded", False) is True
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if number != STORE_FORMAT:
        msg = (
            f"{path} says store format {number}, this version writes {STORE_FORMAT}: "
            "install the version that made it"
        )
        raise StoreError(msg, reason="store-format")
    sound = isinstance(store_id, str) and isinstance(ledger_id, str | None) and isinstance(epoch, int)
    return Identity(store_id, ledger_id, epoch, unrecorded) if sound and store_id else None


def same_process(worker: str, other: str) -> bool:
    """Return whether two workers' ids are of one process: they name machine and process first."""
    return worker.rpartition("-")[0] == other.rpartition("-")[0]


def _keep_identity(
    directory: Path, ledger_id: str | None, epoch: int, *, fsync: bool, unrecorded: bool | None = None
) -> None:
    """Write the ledger's id and its epoch into ``store.json``, never a lower epoch than is there.

    Called when the ledger's own is committed: ``store.json`` is never ahead of the ledger it names.
    *unrecorded*: the ledger does not know all that is stored, and the next crawl with one reads the store.
    """
    path = directory / "store.json"
    try:
        with _turn(directory / "store.lock"):
            found = _read_identity(path)
            wanted = replace(
                found,
                ledger_id=ledger_id or found.ledger_id,
                epoch=max(found.epoch, epoch),
                unrecorded=found.unrecorded if unrecorded is None else unrecorded,
            )
            if wanted != found:
                _write_identity(directory, wanted, fsync=fsync, over=True)
    except OSError as error:
        msg = f"{path} cannot be written: {error.strerror}"
        raise StoreError(msg, reason="store-not-writable") from error


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Keep other processes out. Where locks do nothing, the epoch may fall behind, and nothing else."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _write_identity(directory: Path, identity: Identity, *, fsync: bool, over: bool = False) -> None:
    """Write ``store.json``: a new store's only if there is none, a known store's *over* the old one."""
    path, temporary = directory / "store.json", directory / f"store.{secrets.token_hex(8)}.tmp"
    document = {"format": STORE_FORMAT, **asdict(identity)}
    temporary.write_text(json.dumps(document) + "\n")
    try:
        if fsync:
            _sync(temporary)
        if over or identity.ledger_id is not None:
            os.rename(temporary, path)
        else:
            _link_or_rename(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
    if fsync:
        _sync(directory)


def _link_or_rename(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass  # somebody else's: the one that counts
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        os.rename(temporary, path)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _register_worker(folder: Path, held: ExitStack) -> str:
    """Return a new worker's id; its file is there, and locked, as long as *held* is not closed.

    It gets its name when it is locked already: before that others would take it for a dead one.
    """
    worker_id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(8)}"
    path, temporary = folder / worker_id, folder / f".{worker_id}.tmp"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o600)
    held.callback(os.close, fd)
    fcntl.flock(fd, fcntl.LOCK_EX)
    os.rename(temporary, path)
    return worker_id


def _dead_workers(folder: Path, mine: str) -> list[str]:
    """Return the workers of this machine whose lock nobody holds any more.

    Only saves the wait for their leases to end; correctness rests on fences alone.
    """
    dead = []
    for name in os.listdir(folder):
        if name == mine or name.rsplit("-", 2)[0] != socket.gethostname():
            continue
        try:
            fd = os.open(folder / name, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
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


def ledger_file(settings: StreamingSettings, directory: Path) -> Path | None:
    """Return the ledger's file, ``None`` if it is in a server."""
    url = settings.database_url
    if url is None:
        return (directory / "ledger.sqlite3").absolute()
    return Path(url.removeprefix("sqlite:///")).absolute() if url.startswith("sqlite:") else None


def ledger_url(settings: StreamingSettings, directory: Path) -> str:
    """Return the SQLAlchemy URL of the ledger; raise ``StoreError`` for SQLite on a network filesystem."""
    url = settings.database_url or f"sqlite:///{directory / 'ledger.sqlite3'}"
    path = ledger_file(settings, directory)
    if path is not None:
        kind = filesystem_of(path.parent)
        if kind in NETWORK_FILESYSTEMS:
            msg = (
                f"{path} is on {kind}, where SQLite's locks cannot be trusted: set STREAMING_DATABASE_URL "
                "to sqlite:///PATH on a local disk, or to a PostgreSQL database"
            )
            raise StoreError(msg, reason="store-unsafe")
    return url


def _open_ledger(
    settings: StreamingSettings,
    directory: Path,
    identity: Identity,
    worker_id: str,
    use: Use,
) -> Ledger:
    from scrapy_streaming.storage.ledger import Ledger

    return Ledger.open(
        ledger_url(settings, directory),
        store_id=identity.store_id,
        worker_id=worker_id,
        lease_seconds=settings.lease_seconds,
        max_attempts=settings.max_attempts,
        fsync=settings.fsync,
        events=settings.history_days > 0,
        create=use is not Use.LOOK,
        ledger_id=None if use is Use.REBUILD else identity.ledger_id,
        epoch=identity.epoch,
    )


def filesystem_of(path: Path, mountinfo: str | None = None) -> str | None:
    """Return the type of the filesystem *path* is on, ``None`` if the system does not say."""
    if mountinfo is None:
        try:
            mountinfo = os.fsdecode(Path("/proc/self/mountinfo").read_bytes())
        except OSError:
            return None
    best, kind = -1, None
    resolved = path.resolve()
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        mount = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), left.split(" ")[4])
        if len(mount) >= best and resolved.is_relative_to(mount):  # of two in one place the later is seen
            best, kind = len(mount), right.split(" ")[0]
    return kind


def _is_local(kind: str | None) -> bool:
    """Whether a lock that was got there tells that nobody else has it (storage rule 7)."""
    return kind is not None and kind not in NETWORK_FILESYSTEMS and not kind.startswith("fuse.")
