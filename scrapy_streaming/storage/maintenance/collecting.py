"""Removing what nobody needs, beside crawls that run (F26, I15).

What keeps a blob that somebody is about to need:

- A blob is looked at only if it is older than the grace time. While other workers run that is an
  hour at least: nobody takes that long from publishing to recording.
- Who finds a blob that is there and vouches for it changes its time of access, and then looks
  whether it is still there; we move it away, and then look at that time (``LocalBlobStore.take``).
- Who knows of a blob without touching it, because it was told to build on it, cannot complete
  with it once it is marked ``deleting``; and none is marked while such a claim may still run.

So: mark in the ledger what nothing refers to, move it to the trash, record it as missing, unlink
it. Killed in between, the next one puts back what was recorded meanwhile.
"""

from __future__ import annotations

import os
import re
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from scrapy_streaming.exceptions import StoreError
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import JobState
from scrapy_streaming.storage.blobs import BlobFile
from scrapy_streaming.storage.failpoints import failpoint
from scrapy_streaming.storage.maintenance.common import (
    MaintenanceRuns,
    Progress,
    Store,
    alone,
    batches,
    entries,
    is_file,
    lock,
    own_directory,
    running_workers,
)
from scrapy_streaming.storage.maintenance.inspection import Rebuilt, read_unknown
from scrapy_streaming.storage.sidecar import PartName

#: Seconds after which what was published is recorded, or its worker is gone (the ledger is waited for less).
SETTLING: Final = 3600.0
#: Parts of failed and dead jobs are kept so many times as long: somebody may ask for them again.
FAILED_TIMES: Final = 7.0
#: Seconds of grace that a crawl gives at its start.
GRACE: Final = 86400.0
#: Parts that are locked and looked up together.
PARTS_AT_ONCE: Final = 64

_GONE = re.compile(r"([0-9a-f]{64})\.gone", re.ASCII)
_HEX = re.compile(r"[0-9a-f]{64}", re.ASCII)
_TEMPORARY_BLOB = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{16}\.tmp", re.ASCII)
_TEMPORARY_NAME = re.compile(r"\.[0-9a-f]{32}\.tmp", re.ASCII)
_TEMPORARY_WORKER = re.compile(r"\..+-[0-9]+-[0-9a-f]{16}\.tmp", re.ASCII)
_TEMPORARY_STORE = re.compile(r"(?:store|metrics)\.[0-9a-f]{16}\.tmp", re.ASCII)

#: Told of each thing that is removed, or would be: its kind, where it is, its bytes.
Tell = Callable[[str, Path, int], None]


def _silent(kind: str, path: Path, size: int) -> None:
    """Say nothing."""


@dataclass
class Collected:
    """What ``collect`` removed, or would remove: count and bytes by kind.

    Kinds: ``parts``, ``temporary``, ``orphans``, ``superseded``, ``trash``. ``grace``: the seconds
    that were kept to. ``restored``: blobs that a killed ``gc`` had taken away and that are in use.
    ``tell`` is told of each.
    """

    grace: float
    dry_run: bool = False
    restored: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    tell: Tell = _silent

    @property
    def bytes(self) -> int:
        """The bytes of all kinds together."""
        return sum(self.sizes.values())

    def add(self, kind: str, path: Path, size: int) -> None:
        """Count one thing."""
        self.tell(kind, path, size)
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.sizes[kind] = self.sizes.get(kind, 0) + size


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What ``reconcile`` did: parts and temporary files removed, blobs put back, events forgotten.

    ``read`` is what was recorded of a store whose ledger had been put back.
    """

    parts: int = 0
    temporary: int = 0
    restored: int = 0
    events: int = 0
    read: Rebuilt | None = None


def collect(
    store: Store,
    *,
    grace: float = GRACE,
    superseded: bool = False,
    dry_run: bool = False,
    tell: Tell = _silent,
    progress: Progress | None = None,
) -> Collected:
    """Remove what nobody needs and is older than *grace* seconds; return what that was.

    Parts of jobs that are done, unknown or failed long ago, temporary files of killed processes,
    blobs that were published and never recorded, and with *superseded* blobs that only old
    generations of jobs name. *grace* is ``SETTLING`` seconds at least while other workers run.
    With *dry_run* nothing is changed. Raises ``MaintenanceRuns``, ``LedgerError`` (``ledger-put-back``,
    ``ledger-behind`` until the store has been read), ``OSError``.
    """
    with alone(store) as now:
        store.refuse_unknown()
        # whoever comes after this publishes files that are younger than `now`
        others = running_workers(own_directory(store) / "workers", store.worker_id)
        result = Collected(max(grace, SETTLING) if others else grace, dry_run, tell=tell)
        round_ = _Round(store, now, result, progress)
        round_.empty_trash()
        round_.sweep_parts(failed=True)
        round_.sweep_own_temporaries()
        linked = round_.sweep_names()
        round_.sweep_blobs(linked)
        if superseded:
            round_.sweep_superseded(linked)
        return result


def reconcile(
    store: Store, *, history_seconds: float, grace: float = GRACE, stop: threading.Event | None = None
) -> Reconciled:
    """Do what is due at the start of a crawl: parts, temporary files, a killed ``gc``, old events.

    After an older copy of the ledger was put back, blobs that it does not know are read and recorded,
    until *stop* is set; no part is removed on its word. Does nothing, and leaves it to whoever does
    it just now, beside other maintenance. Raises ``LedgerError``, ``WriteFailed``, ``OSError``.
    """
    try:
        with alone(store) as now:
            result = Collected(max(grace, SETTLING))
            round_ = _Round(store, now, result, None)
            round_.empty_trash(remove=False)
            older = store.ledger.standing().result().unread
            read = read_unknown(store, stop or threading.Event()) if older else None
            if not older:
                round_.sweep_parts(failed=False)
            round_.sweep_own_temporaries()
            events = 0
            while trimmed := store.ledger.trim_events(history_seconds).result():
                events += trimmed
    except MaintenanceRuns:
        return Reconciled()
    counts = result.counts
    parts, temporary = counts.get("parts", 0), counts.get("temporary", 0)
    return Reconciled(parts, temporary, result.restored, events, read)


class _Round:
    """One run over the store: what is older than ``result.grace`` seconds before *now* may go."""

    def __init__(self, store: Store, now: float, result: Collected, progress: Progress | None) -> None:
        self._store = store
        self._now = now
        self._result = result
        self._progress = progress
        self._seen = [0, 0]
        #: in the blobs' own tree: a rename must not leave its filesystem, and STREAMING_DIR may
        self._trash = store.blobs.root / "blobs" / ".trash"

    def _old(self, info: os.stat_result, times: float = 1.0) -> bool:
        # change, not modification: nobody can set that, and a new name or a rename counts
        return info.st_ctime < self._now - times * self._result.grace

    def _unlink(self, kind: str, path: Path, size: int) -> None:
        if not self._result.dry_run:
            try:
                os.unlink(path)
            except FileNotFoundError:
                return
        self._result.add(kind, path, size)

    # -- parts and temporary files -----------------------------------------------------------

    def sweep_parts(self, *, failed: bool) -> None:
        """Remove parts whose job is done or unknown, with *failed* of jobs failed long ago, too."""
        for some in batches(self._old_parts().items(), PARTS_AT_ONCE):
            with ExitStack() as held:
                free = [(name, info) for name, info in some if self._held(name, held)]
                states = self._store.ledger.states_of({name.key for name, _ in free}).result()
                for name, info in free:
                    state = states.get(name.key)
                    ended = failed and state in (JobState.FAILED, JobState.DEAD)
                    if state in (None, JobState.DONE) or (ended and self._old(info, FAILED_TIMES)):
                        self._remove_part(name, info)

    def _old_parts(self) -> dict[PartName, os.stat_result]:
        """Return the parts all of whose files are old, each with its newest file."""
        newest: dict[PartName, os.stat_result] = {}
        for path, info in entries(self._store.parts.directory):
            name = PartName.parse(path.name)
            if name is None or path.name == name.temporary:
                continue
            if name not in newest or info.st_ctime > newest[name].st_ctime:
                newest[name] = info
        return {name: info for name, info in newest.items() if self._old(info)}

    def _held(self, name: PartName, held: ExitStack) -> bool:
        """Whether nobody writes a part; nobody takes it over either until *held* is closed."""
        path = self._store.parts.directory / name.part
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return True  # only what vouched for it is left
        except OSError:
            return False  # a link, or not ours: not understood
        held.callback(os.close, fd)
        return is_file(os.fstat(fd)) and lock(fd)

    def _remove_part(self, name: PartName, info: os.stat_result) -> None:
        path = self._store.parts.directory / name.part
        with suppress(FileNotFoundError):
            info = os.lstat(path)
        if not self._result.dry_run:
            self._store.parts.remove(name)
        self._result.add("parts", path, info.st_size if info.st_nlink == 1 else 0)

    def sweep_own_temporaries(self) -> None:
        """Remove what killed processes left beside parts, workers' files and the store's identity."""
        own = own_directory(self._store)
        for folder, grammar in (
            (self._store.parts.directory, None),
            (own / "workers", _TEMPORARY_WORKER),
            (own, _TEMPORARY_STORE),
        ):
            for path, info in entries(folder):
                if grammar is None:
                    name = PartName.parse(path.name)
                    ours = name is not None and path.name == name.temporary
                else:
                    ours = grammar.fullmatch(path.name) is not None
                # whoever just starts is not among the others yet: its files are spared whatever the grace
                settled = info.st_ctime < self._now - SETTLING
                if ours and settled and is_file(info) and self._old(info):
                    self._unlink("temporary", path, info.st_size)

    def sweep_names(self) -> set[str]:
        """Remove temporary names; return the digests (hex) that symbolic links in the store lead to."""
        root, linked = self._store.blobs.root.resolve(), set()
        own = own_directory(self._store).resolve()
        for where, folders, files in os.walk(root):
            here = Path(where)
            blobs = ("sha256", ".trash") if here == root / "blobs" else ()
            folders[:] = [name for name in folders if here / name != own and name not in blobs]
            for name in (*files, *folders):
                path = here / name
                with suppress(OSError):  # gone meanwhile
                    info = os.lstat(path)
                    if stat.S_ISLNK(info.st_mode):
                        linked.add(Path(os.readlink(path)).name)
                    if _TEMPORARY_NAME.fullmatch(name) and not stat.S_ISDIR(info.st_mode) and self._old(info):
                        self._unlink("temporary", path, info.st_size)
        return {name for name in linked if _HEX.fullmatch(name)}

    # -- blobs -------------------------------------------------------------------------------

    def sweep_blobs(self, linked: set[str]) -> None:
        """Remove blobs that were published and never recorded, and what was written aside for one."""
        for shard, info in entries(self._store.blobs.root / "blobs" / "sha256"):
            if stat.S_ISDIR(info.st_mode):
                for path, one in entries(shard):
                    if _TEMPORARY_BLOB.fullmatch(path.name) and is_file(one) and self._old(one):
                        self._unlink("temporary", path, one.st_size)
        for some in batches(self._candidates(linked)):
            found = {str(file.digest): file for file in some}
            ledger = self._store.ledger
            gone = ledger.orphans(found).result()
            if gone and not self._result.dry_run:
                gone = ledger.condemn_orphans({d: found[d].info.st_size for d in gone}).result()
            self._remove("orphans", {digest: found[digest] for digest in gone})

    def _candidates(self, linked: set[str]) -> Iterator[BlobFile]:
        for file in self._store.blobs.files():
            self._seen[0] += 1
            self._seen[1] += file.info.st_size
            if self._progress is not None and self._seen[0] % 1000 == 0:
                self._progress(*self._seen)
            if self._unused(file, linked):
                yield file

    def _unused(self, file: BlobFile, linked: set[str]) -> bool:
        return self._old(file.info) and file.info.st_nlink == 1 and file.digest.hex not in linked

    def sweep_superseded(self, linked: set[str]) -> None:
        """Remove blobs that only old generations of jobs name."""
        ledger, age, after = self._store.ledger, self._result.grace, None
        while page := ledger.superseded(age, after=after).result():
            after = page[-1][0]
            files = filter(None, (self._file(Digest.parse(digest)) for digest, _ in page))
            for some in batches(file for file in files if self._unused(file, linked)):
                found = {str(file.digest): file for file in some}
                gone = frozenset(found)
                if not self._result.dry_run:
                    gone = ledger.condemn_superseded(gone, age).result()
                self._remove("superseded", {digest: found[digest] for digest in gone})

    def _file(self, digest: Digest) -> BlobFile | None:
        path = self._store.blobs.path(digest)
        try:
            info = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return BlobFile(digest, path, info) if is_file(info) else None

    def _remove(self, kind: str, condemned: dict[str, BlobFile]) -> None:
        """Take the files of blobs that are marked away; unlink those that nobody recorded meanwhile."""
        if self._result.dry_run:
            for file in condemned.values():
                self._result.add(kind, file.path, file.info.st_size)
            return
        if not condemned:
            return
        failpoint("gc-marked")
        self._make_trash()
        blobs = self._store.blobs
        taken = [digest for digest, file in condemned.items() if blobs.take(file, self._gone(file.digest))]
        failpoint("gc-taken")
        buried = self._store.ledger.bury(condemned).result()
        failpoint("gc-buried")
        for digest in taken:
            file = condemned[digest]
            if digest in buried:
                os.unlink(self._gone(file.digest))
                self._result.add(kind, file.path, file.info.st_size)
            else:
                blobs.put_back(file.digest, self._gone(file.digest))
                self._result.restored += 1

    # -- the trash ---------------------------------------------------------------------------

    def _gone(self, digest: Digest) -> Path:
        return self._trash / f"{digest.hex}.gone"

    def _make_trash(self) -> None:
        with suppress(FileExistsError):
            os.mkdir(self._trash, 0o700)
        if not stat.S_ISDIR(os.lstat(self._trash).st_mode):
            msg = f"{self._trash} is no plain directory; nothing was moved through it"
            raise StoreError(msg, reason="store-unsafe")

    def empty_trash(self, *, remove: bool = True) -> None:
        """Put back what a killed ``gc`` took away and is in use; *remove* the rest when it is old."""
        if not self._result.dry_run:
            self._store.ledger.bury(None).result()  # who marked them is gone: nobody else collects
        if os.path.islink(self._trash):
            return
        for some in batches(entries(self._trash)):
            found = {}
            for path, info in some:
                match = _GONE.fullmatch(path.name)
                if match is not None and is_file(info):
                    found[str(Digest(match[1]))] = (path, info)
            rows = self._store.ledger.blobs_of(found).result()
            for digest, (path, info) in found.items():
                known = digest in rows and rows[digest].state == "present"
                if known and not os.path.lexists(self._store.blobs.path(Digest.parse(digest))):
                    self._restore(Digest.parse(digest), path)
                elif remove and self._old(info):
                    self._unlink("trash", path, info.st_size)

    def _restore(self, digest: Digest, path: Path) -> None:
        if not self._result.dry_run:
            self._store.blobs.put_back(digest, path)
        self._result.restored += 1
