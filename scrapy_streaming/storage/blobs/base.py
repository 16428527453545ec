"""The contract of a blob store and the values that it returns: all that is used outside this package.

What may live here: what every store can do, local or remote. No ``os.stat`` result, no link and no path of a
blob is part of it; a location is text for people. There are two exceptions: ``local_file`` is the path that
hooks read as ``response.part.path``, and ``folders`` are on the disks whose free space is watched.
"""

from __future__ import annotations

import abc
import enum
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import NotedFile, RecordedName, StoredRepresentation
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage.complete_part import CompletePart
from scrapy_streaming.storage.leftovers import Leftover


class Tampered(enum.StrEnum):
    """A change to stored bytes from outside; each has its warning and its statistic (R77)."""

    BAD_BLOB = "bad-blob"
    BLOB_MISSING = "blob-missing"
    BAD_NAME = "bad-name"
    NAME_MISSING = "name-missing"

    @property
    def of_name(self) -> bool:
        """Whether a name was changed, not a blob."""
        return self in (Tampered.BAD_NAME, Tampered.NAME_MISSING)


class Presence(enum.Enum):
    """What is at a blob's place: a blob, nothing, or something else; bytes are not read."""

    BLOB = enum.auto()
    NOTHING = enum.auto()
    OTHER = enum.auto()


@dataclass(frozen=True, slots=True)
class Published:
    """A blob that exists under its digest. ``size`` in bytes.

    ``stamp`` is a token of the bytes as they are now: it changes when anything writes to the blob.
    Only the store reads it.
    """

    digest: Digest
    size: int
    deduplicated: bool
    stamp: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundBlob:
    """A blob, or a name with bytes of its own, as a listing found it; its bytes were not read.

    ``size`` in bytes; ``changed_at`` is its last change, which may be a new name, in seconds since the
    epoch. ``shared``: a name uses the bytes of the blob itself, not a copy. ``location`` is for people.
    ``name`` is the name whose bytes these are, ``None`` for a blob.
    """

    digest: Digest
    size: int
    changed_at: float
    stamp: bytes
    shared: bool = False
    location: str = ""
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Inspection:
    """Whether stored bytes are there and right.

    ``stamp`` is that of right bytes, ``None`` if they were ``tampered`` with; then ``found`` is the blob
    that is there, if any. ``hashed``: the bytes were read, since their stamp had changed. ``restored``: the
    blob was missing, and was made again from its name.
    """

    stamp: bytes | None = None
    hashed: bool = False
    tampered: Tampered | None = None
    found: FoundBlob | None = None
    restored: bool = False


@dataclass(frozen=True, slots=True)
class Named:
    """A name that leads to stored bytes.

    ``path`` is below the store's root, in its shortest form. ``stamp`` is the blob's, ``None`` if the blob
    was written to meanwhile; ``own_stamp`` is that of a name with bytes of its own. ``hashed``: the name's
    bytes were read. ``tampered``: how the name had been changed before it was made again; ``kept`` is where
    in quarantine the changed bytes are now.
    """

    path: str
    stamp: bytes | None = None
    own_stamp: bytes | None = None
    hashed: bool = False
    tampered: Tampered | None = None
    kept: str | None = None


@dataclass(frozen=True, slots=True)
class Adopted:
    """A file that another program stored under a name, and that is a blob now.

    ``path`` is its name, ``size`` is in bytes, ``stored_at`` is its time of modification in seconds since
    the epoch. ``stamp`` is the blob's, ``own_stamp`` that of a name with bytes of its own, ``file_stamp``
    that of the file that the name leads to. ``hashed``: its bytes were read.
    """

    path: str
    digest: Digest
    size: int
    stored_at: float
    stamp: bytes
    file_stamp: bytes
    own_stamp: bytes | None = None
    hashed: bool = True


@dataclass(frozen=True, slots=True)
class Hashed:
    """The SHA-256 of the bytes of ``found``, 64 hex digits; ``None`` if unreadable, with ``why``.

    ``found`` is its state after the bytes were read.
    """

    found: FoundBlob
    hexadecimal: str | None
    why: str = ""

    @property
    def good(self) -> bool:
        """Whether the bytes have the digest."""
        return self.hexadecimal == self.found.digest.hex


@dataclass(frozen=True, slots=True)
class Survey:
    """What one walk over a store found: the digests (hex) of blobs that links lead to, and leftovers."""

    linked: frozenset[str] = frozenset()
    leftovers: tuple[Leftover, ...] = ()


def blob_key(digest: Digest) -> str:
    """Return a blob's path below the store's root, as it is reported and recorded."""
    return f"blobs/sha256/{digest.hex[:2]}/{digest.hex}"


class BlobStore(abc.ABC):
    """Stores complete parts by their digest, and gives them the names that people use.

    All calls block, and may be made from several threads and processes at once. Methods that write raise
    ``WriteFailed`` if the store cannot write the bytes.
    """

    #: Whether complete parts are stored by their digest; if not, only names have bytes.
    keeps_blobs: bool = True
    #: Whether stored bytes get names; if not, they are reported by the path of their blob.
    makes_names: bool = True
    #: Where damaged bytes are moved to; for people.
    quarantine_location: str = ""
    #: Folders on the disks that the bytes are written to, whose free space is watched; none if remote.
    folders: tuple[Path, ...] = ()

    @classmethod
    @abc.abstractmethod
    def serves(cls, settings: StreamingSettings) -> bool:
        """Return whether *settings* ask for this kind of store."""

    @classmethod
    @abc.abstractmethod
    def from_settings(cls, settings: StreamingSettings, root: Path, quarantine: Path) -> Self:
        """Return the store at *root*, with *quarantine* for damaged bytes; raise ``OSError``."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release what the store has open."""

    # -- publishing ------------------------------------------------------------------------

    @abc.abstractmethod
    def publish(self, part: CompletePart) -> Published:
        """Store the part's bytes, durably and atomically, under their digest.

        Bytes that are stored already are verified and used. The part stays. Raises ``IntegrityError`` if the
        part does not have its length or its digest.
        """

    @abc.abstractmethod
    def quarantine(self, part: CompletePart) -> None:
        """Move a part whose bytes are not the expected ones to quarantine (E9)."""

    # -- reading ---------------------------------------------------------------------------

    @abc.abstractmethod
    def open(self, digest: Digest, name: str | None = None) -> BinaryIO:
        """Return a stream of stored bytes; *name* is their name, if they have one.

        Raises ``OSError`` if they are missing, ``StoreError`` (``finalization-off``) without *name* from a
        store that has no blobs.
        """

    def local_file(self, digest: Digest, name: str | None = None) -> Path | None:  # noqa: ARG002 - used where overridden
        """Return the path of stored bytes on this machine, ``None`` from a store that is not on it.

        For hooks that read ``response.part.path``. Arguments and ``StoreError`` as ``open``; the file may be
        missing.
        """
        return None

    @abc.abstractmethod
    def describe(self, digest: Digest) -> str:
        """Return where a blob is, or would be, as text for a log line."""

    # -- what is there ---------------------------------------------------------------------

    @abc.abstractmethod
    def find(self, digest: Digest) -> FoundBlob | None:
        """Return a blob without reading its bytes; ``None`` if there is none."""

    @abc.abstractmethod
    def presence(self, digest: Digest) -> Presence:
        """Return what is at a blob's place."""

    def has(self, digest: Digest, size: int) -> bool:
        """Return whether the blob exists and has *size* bytes, which are not read."""
        found = self.find(digest)
        return found is not None and found.size == size

    @abc.abstractmethod
    def verify(self, digest: Digest) -> bool:
        """Return whether the blob exists and its bytes, which are all read, have its digest."""

    @abc.abstractmethod
    def inspect_blob(self, digest: Digest, size: int, stamp: bytes | None) -> Inspection:
        """Return whether the blob exists and its bytes are right (R77).

        A blob of *size* bytes whose stamp is *stamp*, that of right bytes, is right. One with another stamp
        is read.
        """

    def inspect(self, stored: StoredRepresentation) -> Inspection:
        """Return whether the bytes of a recorded representation exist and are right, as ``inspect_blob``."""
        return self.inspect_blob(Digest.parse(stored.digest), stored.size, stored.stamp)

    @abc.abstractmethod
    def renew_stamp(self, digest: Digest, stamp: bytes) -> bytes | None:
        """Return the current stamp of a blob; ``None`` if it was written to since *stamp*, or is missing."""

    @abc.abstractmethod
    def blobs(self) -> Iterator[FoundBlob]:
        """Yield every blob, in the order of digests; skip anything that is not a blob (F24)."""

    @abc.abstractmethod
    def hash(self, found: FoundBlob, stop: threading.Event) -> Hashed | None:
        """Return the digest of the bytes; ``None`` if they are missing, or *stop* was set meanwhile."""

    # -- damage ----------------------------------------------------------------------------

    @abc.abstractmethod
    def set_aside(self, found: FoundBlob) -> bool:
        """Move a blob to quarantine unless it changed since *found*; return whether it was moved (E9)."""

    def keep_replaced(self, stored: StoredRepresentation) -> str | None:  # noqa: ARG002 - used where overridden
        """Keep the bytes that replaced those of a recorded name in quarantine; return where.

        ``None`` if there was nothing to keep. For stores without blobs.
        """
        return None

    # -- names -----------------------------------------------------------------------------

    @abc.abstractmethod
    def check_name(self, wanted: str) -> str:
        """Return a path below the store's root in its shortest form.

        Raises ``StoreError`` (``store-unsafe``) for a path that leaves the store, is in the package's own
        folders, or cannot be a file's name (E1, F19).
        """

    @abc.abstractmethod
    def name(
        self,
        digest: Digest,
        wanted: str,
        *,
        stamp: bytes | None = None,
        recorded: RecordedName | None = None,
        part: CompletePart | None = None,
    ) -> Named:
        """Give stored bytes the name *wanted*, durably; return the name.

        Atomic: a reader sees the old bytes or the new, never none (storage rule 13). *stamp* is that of
        the blob, whose bytes are known to be right. *recorded* is the name that led to these bytes before;
        if other bytes are there now, and no blob has them, they are kept in quarantine (R77). *part* is what
        the blob was made from. Raises ``StoreError`` as ``check_name`` (E1).
        """

    def is_taken(self, path: str) -> bool:
        """Return whether anything has the name *path*."""
        return self.written_at(path) is not None

    @abc.abstractmethod
    def written_at(self, path: str) -> float | None:
        """Return the time of modification of the file at *path*, in seconds since the epoch.

        ``None`` if there is none.
        """

    @abc.abstractmethod
    def was_replaced(self, stored: StoredRepresentation, wanted: str) -> bool:
        """Return whether *wanted* is the recorded name and has other bytes than the recorded ones.

        Another program wrote them, such as a crawl without the ledger, ``FilesPipeline`` or a user. They
        may be newer.
        """

    @abc.abstractmethod
    def adopt(
        self,
        path: str,
        *,
        noted: NotedFile | None = None,
        checksum: str | None = None,
        stop: threading.Event | None = None,
        alone: bool = False,
    ) -> Adopted:
        """Make a blob of the file that another program stored at *path*; return its description.

        Its bytes are read once, or not at all if its stamp is as *noted*. *checksum* is the one that the
        bytes must have, in hexadecimal: 64 digits of SHA-256, or 32 of MD5 as ``FilesPipeline`` reports it.
        Once *stop* is set nothing more is read. *alone*: the caller excludes ``gc``, so that an existing
        blob is not marked as in use, which would change its stamp. Raises ``NotAdopted`` with the reason.
        """

    # -- for maintenance -------------------------------------------------------------------

    def names(self, spared: Collection[Path] = ()) -> Iterator[str]:  # noqa: ARG002 - used where overridden
        """Yield the paths of all files in the store, except the package's own and *spared*."""
        return iter(())

    def copy_of(self, digest: Digest, path: str) -> FoundBlob | None:  # noqa: ARG002 - used where overridden
        """Return the file at *path*, a name of the blob, if it has bytes of its own; else ``None``."""
        return None

    def survey(self) -> Survey:
        """Walk over the store; return which blobs links lead to, and what killed processes left."""
        return Survey()

    @abc.abstractmethod
    def move_to_trash(self, found: FoundBlob) -> bool:
        """Move a blob to the trash unless it changed since it was *found*; return whether it was moved.

        If a publisher verified the blob meanwhile, it stays. A later publisher finds none, and stores it
        again.
        """

    @abc.abstractmethod
    def delete_trashed(self, digest: Digest) -> bool:
        """Delete a blob in the trash; return whether there was one."""

    @abc.abstractmethod
    def restore_trashed(self, digest: Digest) -> None:
        """Move a blob in the trash back to its place, durably, unless there is a blob again."""

    @abc.abstractmethod
    def trashed(self) -> Iterator[FoundBlob]:
        """Yield the blobs in the trash."""

    def shared_sizes(self) -> Callable[[str], int | None]:
        """Return a function from a name to the size of the blob whose bytes it uses, in bytes.

        It returns ``None`` for a name with bytes of its own, and raises ``NotAdopted`` for a link to a blob
        that is missing.
        """
        return lambda _path: None

    def give_own(self, path: str, digest: Digest | None = None) -> None:
        """Give the name *path* bytes of its own: those that it leads to, or those of the blob *digest*.

        Atomic and durable; time, permissions and, for root, the owner stay. Raises ``NotAdopted``.
        """
        if digest is not None:  # else the name has its own: only a file system shares bytes between names
            self.name(digest, path)

    def can_clone(self) -> bool:
        """Return whether a copy needs no space on the disk."""
        return False

    def removable(self) -> list[Path]:
        """Return what may be deleted once every name has bytes of its own."""
        return []
