"""One store: its parts, blobs and ledger, opened and closed together.

What may live here: the order in which they are opened and closed, and the notes to the user about it.
"""

from __future__ import annotations

import enum
import os
import stat
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from scrapy_streaming.exceptions import LedgerError, StoreError, WriteFailed
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage import durable
from scrapy_streaming.storage.blobs import BlobStore, open_blobs
from scrapy_streaming.storage.filesystems import locks_are_reliable
from scrapy_streaming.storage.identity import (
    FROM_NOTHING,
    Identity,
    find_identity,
    open_identity,
    read_identity,
    update_identity,
)
from scrapy_streaming.storage.locations import check_files, has_ledger, ledger_off, ledger_url
from scrapy_streaming.storage.parts import PartStore
from scrapy_streaming.storage.planted import planted_kind
from scrapy_streaming.storage.unrecorded import Unrecorded
from scrapy_streaming.storage.view import StoreView, ledger_behind
from scrapy_streaming.storage.workers import dead_workers, register_worker

if TYPE_CHECKING:  # at run time SQLAlchemy is imported only where a ledger is opened
    from scrapy_streaming.storage.ledger import Ledger, Standing

#: The note of a crawl whose ledger is an older copy (I16).
PUT_BACK: Final = (
    "an older copy of the ledger was put back (ledger-put-back): what it records as done is requested again, "
    "and `scrapy streaming gc` refuses to run until all blobs have been read, which a crawl does in the "
    "background and `scrapy streaming rebuild` at once"
)
#: The note about a ``store.json`` that a power cut left empty or incomplete (storage rule 13c).
MADE_ANEW: Final = "{path} was damaged (store-json) and was made anew from {source}"


class Use(enum.Enum):
    """What a store is opened for.

    Only ``CRAWL`` creates a store. Only ``REBUILD`` creates a new ledger for a store that had one.
    ``MAINTAIN`` neither raises the epoch nor records that the ledger is an older copy. Commands that only
    read use ``view_of``.
    """

    CRAWL = enum.auto()
    MAINTAIN = enum.auto()
    REBUILD = enum.auto()


@dataclass(frozen=True, slots=True)
class Storage:
    """The parts, blobs and ledger of one store, opened together.

    ``jobs`` has the verbs that a download needs: the ledger, or ``Unrecorded`` while it is switched off.
    ``notes`` are whole sentences for the user, to be logged once. ``kept`` is how many durable bytes the
    parts had when the store was opened, by job key. ``fsync``: STREAMING_FSYNC.
    """

    parts: PartStore
    blobs: BlobStore
    jobs: Ledger | Unrecorded
    store_id: str
    worker_id: str
    notes: tuple[str, ...]
    kept: dict[str, int]
    fsync: bool
    _use: Use
    _held: ExitStack

    @classmethod
    def open(cls, settings: StreamingSettings, use: Use = Use.CRAWL) -> Storage:
        """Return the store that *settings* name; a crawl creates it if it is missing.

        Raises ``StoreError`` (not writable, another format, not safe, missing), ``LedgerError``
        (``ledger-off`` for any use but ``CRAWL`` while it is switched off) or ``WriteFailed``; nothing is
        left open then.
        """
        root, directory = _folders(settings)
        if use is not Use.CRAWL and settings.why_no_ledger is not None:
            raise ledger_off(settings.why_no_ledger)
        check_files(settings)
        if use is not Use.CRAWL:
            _refuse_missing(settings, root, directory)
        with ExitStack() as held, ExitStack() as unfinished:
            storage = _Opening(settings, root, directory, use, held, unfinished).open()
            unfinished.pop_all()
            return storage

    @property
    def ledger(self) -> Ledger:
        """The ledger; raises ``LedgerError`` (``ledger-off``) if it is switched off."""
        if isinstance(self.jobs, Unrecorded):
            raise ledger_off("it was switched off when the store was opened")
        return self.jobs

    def close(self) -> None:
        """Carry out what is queued for the ledger and close everything; a second call does nothing.

        Jobs that this worker claimed and did not end are released. If the ledger cannot record that
        (unreachable, or the disk is full), the worker's file stays, and the next process that opens the
        store releases them.
        """
        with self._held, suppress(LedgerError, WriteFailed, StoreError):
            raised = None
            if isinstance(self.jobs, Unrecorded):  # again: a process with a ledger may have cleared it
                update_identity(self._directory, None, 0, fsync=self.fsync, unrecorded=True)
            else:
                freed = self.jobs.end_worker_leases(self.worker_id)
                raised = self._raise_epoch() if self._use is Use.CRAWL else None
                self.jobs.close()  # waits a few seconds at most for a ledger that does not answer
                freed.result()
            (self._directory / "workers" / self.worker_id).unlink(missing_ok=True)
            if raised is not None:
                self._keep_epoch(raised.result())

    def refuse_unknown(self) -> None:
        """Raise ``LedgerError`` if there may be blobs that the ledger does not have.

        ``ledger-behind`` after a crawl without the ledger, ``ledger-put-back`` as ``Queries.refuse_older``.
        """
        if read_identity(self._directory).unrecorded:
            raise ledger_behind()
        self.ledger.refuse_older().result()

    @property
    def _directory(self) -> Path:
        return self.parts.directory.parent

    def raise_epoch(self) -> Standing:
        """Raise the epoch in ledger and ``store.json``, which makes earlier copies of the ledger older ones.

        Returns the ledger's standing after that. Raises ``LedgerError``, ``StoreError`` or ``WriteFailed``.
        """
        standing = self._raise_epoch().result()
        self._keep_epoch(standing)
        return standing

    def _raise_epoch(self) -> Future[Standing]:
        return self.ledger.raise_epoch(read_identity(self._directory).epoch)

    def _keep_epoch(self, standing: Standing) -> None:
        update_identity(self._directory, self.ledger.ledger_id, standing.epoch, fsync=self.fsync)


@dataclass(slots=True)
class _Opening:
    """The steps of opening a store; *held* closes what was opened, *unfinished* removes what was made."""

    settings: StreamingSettings
    root: Path
    directory: Path
    use: Use
    held: ExitStack
    unfinished: ExitStack
    notes: tuple[str, ...] = ()

    def open(self) -> Storage:
        """Return the store, which owns what ``held`` had."""
        try:
            identity, source, worker_id = self._identify()
            blobs = open_blobs(self.settings, self.root, self.directory / "quarantine")
            self.held.callback(blobs.close)
            parts = self._open_parts()
            kept = parts.lengths()
            jobs = self._open_jobs(identity, source, worker_id, parts)
        except OSError as error:
            msg = f"FILES_STORE={str(self.root)!r} cannot be used: {error.strerror} ({error.filename})"
            raise StoreError(msg, reason="store-not-writable") from error
        return Storage(
            parts, blobs, jobs, identity.store_id, worker_id, self.notes, kept, self.settings.fsync,
            self.use, self.held.pop_all(),
        )  # fmt: skip

    def _identify(self) -> tuple[Identity, str, str]:
        """Make the folders; return the identity, the source if it was made anew, and this worker's id."""
        directory = self.directory
        self.notes = _make_folders(self.root, directory, fsync=self.settings.fsync)
        identity, source = open_identity(
            self.settings,
            directory,
            write=self.use is not Use.MAINTAIN,
            rebuild=self.use is Use.REBUILD,
        )
        if source:
            self.notes += (MADE_ANEW.format(path=directory / "store.json", source=source),)
        worker_id = register_worker(directory / "workers", self.held)
        self.unfinished.callback((directory / "workers" / worker_id).unlink, missing_ok=True)
        return identity, source, worker_id

    def _open_parts(self) -> PartStore:
        parts = PartStore(
            self.directory / "parts",
            fsync=self.settings.fsync,
            checkpoint_bytes=self.settings.checkpoint_bytes,
            checkpoint_seconds=self.settings.checkpoint_seconds,
            adopt=locks_are_reliable(self.directory),
            fenced=self.settings.why_no_ledger is None,
        )
        self.held.callback(parts.close)
        return parts

    def _open_jobs(
        self, identity: Identity, source: str, worker_id: str, parts: PartStore
    ) -> Ledger | Unrecorded:
        if self.settings.why_no_ledger is not None:
            update_identity(self.directory, None, identity.epoch, fsync=self.settings.fsync, unrecorded=True)
            return Unrecorded(worker_id, parts.highest_fence)
        ledger = self._open_ledger(identity, worker_id)
        self.held.callback(ledger.close)
        if self.use is not Use.MAINTAIN:
            self._raise_epoch(ledger, identity, source)
        workers = self.directory / "workers"
        for ended in dead_workers(workers, worker_id):
            ledger.end_worker_leases(ended).result()
            durable.unlink(workers / ended)
        return ledger

    def _raise_epoch(self, ledger: Ledger, identity: Identity, source: str) -> None:
        """Raise the ledger's epoch, then that of ``store.json``, which is never ahead of its own ledger."""
        unread = self.use is Use.REBUILD or source == FROM_NOTHING or identity.unrecorded
        standing = ledger.raise_epoch(identity.epoch, unread=unread).result()
        update_identity(
            self.directory, ledger.ledger_id, standing.epoch, fsync=self.settings.fsync, unrecorded=False
        )
        if self.use is Use.CRAWL and standing.unread and standing.put_back_at is not None:
            self.notes += (PUT_BACK,)

    def _open_ledger(self, identity: Identity, worker_id: str) -> Ledger:
        from scrapy_streaming.storage.ledger import Ledger

        return Ledger.open(
            ledger_url(self.settings, self.directory),
            store_id=identity.store_id,
            worker_id=worker_id,
            lease_seconds=self.settings.lease_seconds,
            max_attempts=self.settings.max_attempts,
            fsync=self.settings.fsync,
            events=self.settings.history_days > 0,
            create=self.use is not Use.MAINTAIN,
            ledger_id=None if self.use is Use.REBUILD else identity.ledger_id,
            epoch=identity.epoch,
        )


# -- without opening -------------------------------------------------------------------------


def check_store(settings: StreamingSettings) -> None:
    """Raise ``StoreError`` for what makes ``Storage.open`` fail and shows without opening; change nothing."""
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
        find_identity(settings.directory)


def view_of(settings: StreamingSettings) -> StoreView:
    """Return a read-only view of the store that *settings* name; change nothing.

    Raises ``StoreError`` or ``LedgerError`` as ``Storage.open`` does for ``MAINTAIN``.
    """
    root, directory = _folders(settings)
    if settings.why_no_ledger is not None:
        raise ledger_off(settings.why_no_ledger)
    from scrapy_streaming.storage.ledger import ReadOnlyLedger, database_of

    check_files(settings)
    _refuse_missing(settings, root, directory)
    found = find_identity(directory) or Identity("")
    database = database_of(ledger_url(settings, directory))
    ledger = ReadOnlyLedger(database, found.store_id or None, ledger_id=found.ledger_id, epoch=found.epoch)
    try:
        blobs = open_blobs(settings, root, directory / "quarantine")
    except OSError as error:
        msg = f"FILES_STORE={str(root)!r} cannot be read: {error.strerror} ({error.filename})"
        raise StoreError(msg, reason="store-not-writable") from error
    return StoreView(blobs, ledger, unrecorded=found.unrecorded)


def _folders(settings: StreamingSettings) -> tuple[Path, Path]:
    """Return the store's folder and that of its state; raise ``StoreError`` without FILES_STORE."""
    if settings.store is None or settings.directory is None:
        msg = "FILES_STORE must name a local directory"
        raise StoreError(msg)
    return settings.store, settings.directory


def _refuse_missing(settings: StreamingSettings, root: Path, directory: Path) -> None:
    if not os.path.lexists(directory / "store.json") and not has_ledger(settings):
        msg = f"FILES_STORE={str(root)!r} holds no store yet: nothing was crawled into it"
        raise StoreError(msg, reason="store-missing")


# -- folders ---------------------------------------------------------------------------------


def _make_folders(root: Path, directory: Path, *, fsync: bool) -> tuple[str, ...]:
    """Make the missing folders, durable; return notes for the user."""
    if root.resolve() == directory.resolve():
        msg = f"STREAMING_DIR={str(directory)!r} is FILES_STORE itself: it needs a directory of its own"
        raise StoreError(msg, reason="store-unsafe")
    _make(root, 0o777, fsync=fsync)
    for folder in (directory, directory / "parts", directory / "quarantine", directory / "workers"):
        _make(folder, 0o700, fsync=fsync)
        _refuse_link(folder)
    mode = root.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        return (f"{root} is writable by everyone: any user of this machine can plant files in it",)
    return ()


def _make(folder: Path, mode: int, *, fsync: bool) -> None:
    """Make a folder and its missing parents, each durable in its parent (storage rule 11)."""
    if folder.is_dir():
        return
    if folder != folder.parent:
        _make(folder.parent, 0o777, fsync=fsync)
    folder.mkdir(mode=mode, exist_ok=True)
    if fsync:
        with suppress(PermissionError):  # a parent that is writable and not readable
            durable.sync_folder(folder.parent)


def _refuse_link(folder: Path) -> None:
    if not stat.S_ISDIR(folder.lstat().st_mode):
        msg = f"{folder} is {planted_kind(folder) or 'a file'}; nothing is written through it"
        raise StoreError(msg, reason="store-unsafe")
