"""The contract of a blob store and the values it gives: all that is used outside this package.

What may live here: what every store can do, whatever holds its bytes. No ``os.stat`` result, no link and
no path of a blob is part of it; a location is text for people. Two exceptions serve hooks and disks:
``local_file`` is what ``response.part.path`` gives, ``folders`` are where free space is watched.
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
    """What stands in a blob's place; its bytes are not read."""

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
    """A blob, or a name with bytes of its own, as a listing found it; nothing of its bytes was read.

    ``size`` in bytes; ``changed_at`` is its last change, a new name included, in seconds since the
    epoch. ``shared``: a name uses the very bytes of the blob. ``location`` is for people. ``name`` is
    the name whose bytes these are, ``None`` for a blob.
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
    """What was found in the place of stored bytes.

    ``stamp`` is that of right bytes, ``None`` if they were ``tampered`` with; then ``found`` is what
    stands there, if anything does. ``hashed``: the stamp had changed, so the bytes were read.
    ``restored``: the blob was gone, and was made again from its name.
    """

    stamp: bytes | None = None
    hashed: bool = False
    tampered: Tampered | None = None
    found: FoundBlob | None = None
    restored: bool = False


@dataclass(frozen=True, slots=True)
class Named:
    """A name that leads to stored bytes.

    ``path`` is below the store's root, as short as possible. ``stamp`` is the blob's, ``None`` if
    the blob was written to meanwhile; ``own_stamp`` is that of a name with bytes of its own. ``hashed``: the
    name's bytes were read. ``tampered``: how the name had been changed before it was made again; ``kept``
    is where the bytes are now that stood there.
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

    ``path`` is its name; ``size`` in bytes, ``stored_at`` its time of modification in seconds since
    the epoch. ``stamp`` is the blob's, ``own_stamp`` that of a name with bytes of its own, ``file_stamp``
    that of what the name leads to. ``hashed``: its bytes were read.
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
    """What the bytes of ``found`` hash to, 64 hex digits; ``None`` if they cannot be read, and ``why``.

    ``found`` is as it was after the bytes were read.
    """

    found: FoundBlob
    hexadecimal: str | None
    why: str = ""

    @property
    def good(self) -> bool:
        """Whether the bytes hash to the digest."""
        return self.hexadecimal == self.found.digest.hex


@dataclass(frozen=True, slots=True)
class Survey:
    """What one walk over a store found: digests (hex) that links lead to, and leftovers."""

    linked: frozenset[str] = frozenset()
    leftovers: tuple[Leftover, ...] = ()


def blob_key(digest: Digest) -> str:
    """Return where a blob is below a store's root, as it is reported and recorded."""
    return f"blobs/sha256/{digest.hex[:2]}/{digest.hex}"


class BlobStore(abc.ABC):
    """Where complete parts go: bytes under their digest, and the names that people use for them.

    All calls block, and may be made from several threads and processes at once. Methods that write raise
    ``WriteFailed`` when the store does not take the bytes.
    """

    #: Whether complete parts are stored by their digest; if not, a name is all there is of its bytes.
    keeps_blobs: bool = True
    #: Whether bytes get the names that are asked for.
    makes_names: bool = True
    #: Where bytes are put that are not what they should be, for people.
    quarantine_location: str = ""
    #: Folders on the disks that the bytes go to, whose free space is watched; none for a remote store.
    folders: tuple[Path, ...] = ()

    @classmethod
    @abc.abstractmethod
    def serves(cls, settings: StreamingSettings) -> bool:
        """Return whether *settings* ask for this kind of store."""

    @classmethod
    @abc.abstractmethod
    def from_settings(cls, settings: StreamingSettings, root: Path, quarantine: Path) -> Self:
        """Return the store at *root*, with *quarantine* for bytes that are not what they should be."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release what the store has open."""

    # -- publishing ------------------------------------------------------------------------

    @abc.abstractmethod
    def publish(self, part: CompletePart) -> Published:
        """Make the part's bytes exist, durably and atomically, under their digest.

        Publishing twice is once: bytes that are there already are verified and used. The part stays.
        Raises ``IntegrityError`` if the part does not have the bytes that were counted.
        """

    @abc.abstractmethod
    def quarantine(self, part: CompletePart) -> None:
        """Move a part whose bytes are not what they should be out of use (E9)."""

    # -- reading ---------------------------------------------------------------------------

    @abc.abstractmethod
    def open(self, digest: Digest, name: str | None = None) -> BinaryIO:
        """Return a stream of stored bytes; *name* is the name they were given, if they have one.

        Raises ``OSError`` if they are not there.
        """

    def local_file(self, digest: Digest, name: str | None = None) -> Path | None:  # noqa: ARG002 - implementations
        """Return a file on this machine with stored bytes, as ``open``; ``None`` if there is no such file.

        For hooks that read ``response.part.path``; the file may be missing.
        """
        return None

    @abc.abstractmethod
    def describe(self, digest: Digest) -> str:
        """Return where a blob is, or would be, for a log line."""

    # -- what is there ---------------------------------------------------------------------

    @abc.abstractmethod
    def find(self, digest: Digest) -> FoundBlob | None:
        """Return a blob without reading its bytes; ``None`` if there is none."""

    @abc.abstractmethod
    def presence(self, digest: Digest) -> Presence:
        """Return what stands in a blob's place."""

    def has(self, digest: Digest, size: int) -> bool:
        """Return whether the blob is there and has *size* bytes; they are not read."""
        found = self.find(digest)
        return found is not None and found.size == size

    @abc.abstractmethod
    def verify(self, digest: Digest) -> bool:
        """Return whether the blob is there and its bytes hash to its digest; reads all of them."""

    @abc.abstractmethod
    def inspect_blob(self, digest: Digest, size: int, stamp: bytes | None) -> Inspection:
        """Return whether the blob is there and its bytes are right (R77).

        A blob of *size* bytes with the *stamp* of right ones is right. Any other of that size is read.
        """

    def inspect(self, stored: StoredRepresentation) -> Inspection:
        """Return whether the bytes of a recorded representation are there and right, as ``inspect_blob``."""
        return self.inspect_blob(Digest.parse(stored.digest), stored.size, stored.stamp)

    @abc.abstractmethod
    def renew_stamp(self, digest: Digest, stamp: bytes) -> bytes | None:
        """Return the stamp of a blob that only got or lost names since; ``None`` if it was written to."""

    @abc.abstractmethod
    def blobs(self) -> Iterator[FoundBlob]:
        """Give every blob, in the order of their digests; anything that is no blob is skipped (F24)."""

    @abc.abstractmethod
    def hash(self, found: FoundBlob, stop: threading.Event) -> Hashed | None:
        """Return what the bytes hash to; ``None`` if they are gone, or *stop* was set meanwhile."""

    # -- damage ----------------------------------------------------------------------------

    @abc.abstractmethod
    def set_aside(self, found: FoundBlob) -> bool:
        """Put a blob into quarantine if it is still as it was *found*; return whether that was done (E9)."""

    def keep_replaced(self, stored: StoredRepresentation) -> str | None:  # noqa: ARG002 - implementations
        """Keep in quarantine what stands under a recorded name in place of its bytes; return where.

        ``None`` if nothing had to be kept. For stores without blobs.
        """
        return None

    # -- names -----------------------------------------------------------------------------

    @abc.abstractmethod
    def check_name(self, wanted: str) -> str:
        """Return a path below the store's root in its shortest form.

        Raises ``StoreError`` (``store-unsafe``) for one that leaves the store, leads into the package's own
        folders, or can be no name (E1, F19).
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
        if other bytes stand there now, and no blob has them, they are kept in quarantine (R77). *part* is
        what the blob was made of. Raises ``StoreError`` for a path that leaves the store (E1).
        """

    def is_taken(self, path: str) -> bool:
        """Return whether anything has the name *path*."""
        return self.written_at(path) is not None

    @abc.abstractmethod
    def written_at(self, path: str) -> float | None:
        """Return when what has the name *path* was last written to, in seconds since the epoch.

        ``None`` if nothing has it.
        """

    @abc.abstractmethod
    def was_replaced(self, stored: StoredRepresentation, wanted: str) -> bool:
        """Return whether other bytes than the recorded ones stand at the recorded name *wanted*.

        Another program put them there: a crawl without the ledger, ``FilesPipeline`` or a user. They may
        be newer.
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
        """Make what another program stored at the name *path* a blob; return what it is now.

        Its bytes are read once, or not at all if it is as it was *noted*. *checksum* is what the bytes
        must hash to, hexadecimal: 64 digits of SHA-256 or 32 of MD5, as ``FilesPipeline`` has it. Once
        *stop* is set nothing more is read. *alone*: no ``gc`` runs meanwhile, so a blob that is there
        is not marked as in use, which would change its stamp. Raises ``NotAdopted`` with the reason.
        """

    # -- for maintenance -------------------------------------------------------------------

    def names(self, spared: Collection[Path] = ()) -> Iterator[str]:  # noqa: ARG002 - implementations
        """Give the names in the store, whatever they are; not the package's own files, nor *spared*."""
        return iter(())

    def copy_of(self, digest: Digest, path: str) -> FoundBlob | None:  # noqa: ARG002 - implementations
        """Return the bytes of the blob's name *path* if they are its own; ``None`` if there are none."""
        return None

    def survey(self) -> Survey:
        """Walk over the store once; return what links lead to and what killed processes left."""
        return Survey()

    @abc.abstractmethod
    def move_to_trash(self, found: FoundBlob) -> bool:
        """Take a blob out of its place if it is still as it was *found*; return whether that was done.

        A publisher that verified the blob meanwhile keeps it; a later one finds none and publishes again.
        """

    @abc.abstractmethod
    def delete_trashed(self, digest: Digest) -> bool:
        """Delete a blob in the trash; return whether there was one."""

    @abc.abstractmethod
    def restore_trashed(self, digest: Digest) -> None:
        """Put a blob in the trash back in its place, durably, unless there is one by now."""

    @abc.abstractmethod
    def trashed(self) -> Iterator[FoundBlob]:
        """Give the blobs in the trash."""

    def shared_sizes(self) -> Callable[[str], int | None]:
        """Return a function of a name: how many bytes of a blob it uses, ``None`` if its bytes are its own.

        The function raises ``NotAdopted`` for a link to a blob that is missing.
        """
        return lambda _path: None

    def give_own(self, path: str, digest: Digest | None = None) -> None:
        """Give the name *path* bytes of its own: those that it leads to, or those of a blob.

        Atomic and durable; time, permissions and, for root, the owner stay. Raises ``NotAdopted``.
        """
        if digest is not None:  # else it has them: only a file system shares bytes between names
            self.name(digest, path)

    def can_clone(self) -> bool:
        """Return whether a copy needs no room."""
        return False

    def removable(self) -> list[Path]:
        """Return what may be deleted once every name has bytes of its own."""
        return []
