"""A blob store in memory: the contract without a file system, to see that nothing above relies on one."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import BinaryIO, Self

from scrapy_streaming.exceptions import IntegrityError, NotAdopted, StoreError, WriteFailed
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import NotedFile, RecordedName, StoredRepresentation
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage.blobs import (
    Adopted,
    BlobStore,
    FoundBlob,
    Hashed,
    Inspection,
    Named,
    Presence,
    Published,
    Tampered,
    blob_key,
)
from scrapy_streaming.storage.complete_part import CompletePart

_versions = count(1)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Held:
    """Bytes with the version that they got when they were last written, and when that was.

    ``used`` grows when a publisher relies on bytes that were there already.
    """

    data: bytes
    version: bytes
    written_at: float
    used: int = 0

    @classmethod
    def new(cls, data: bytes) -> Self:
        return cls(data, next(_versions).to_bytes(24, "big"), time.time())


class MemoryStore(BlobStore):
    """Blobs and names in dictionaries; every name has bytes of its own."""

    quarantine_location = "memory"

    def __init__(self) -> None:
        self.held: dict[str, Held] = {}
        self.named: dict[str, Held] = {}
        self.trash: dict[str, Held] = {}
        self.quarantined: list[bytes] = []
        self._lock = threading.RLock()

    @classmethod
    def serves(cls, settings: StreamingSettings) -> bool:
        return False

    @classmethod
    def from_settings(cls, settings: StreamingSettings, root: Path, quarantine: Path) -> Self:
        return cls()

    def close(self) -> None:
        self.held.clear()

    # -- publishing ------------------------------------------------------------------------

    def publish(self, part: CompletePart) -> Published:
        data = self._bytes_of(part)
        if len(data) != part.length:
            msg = f"{part.digest}: not the {part.length} bytes that were counted"
            raise IntegrityError(msg, reason="length-mismatch")
        if sha(data) != part.digest.hex:
            msg = f"bytes changed while {part.digest} was published"
            raise IntegrityError(msg)
        with self._lock:
            there = self.held.get(part.digest.hex)
            duplicate = there is not None and self.verify(part.digest)
            if there is not None and duplicate:
                held = Held(there.data, there.version, there.written_at, there.used + 1)
            else:
                if there is not None:
                    self.quarantined.append(there.data)
                held = Held.new(data)
            self.held[part.digest.hex] = held
        return Published(part.digest, part.length, duplicate, held.version)

    @staticmethod
    def _bytes_of(part: CompletePart) -> bytes:
        try:
            return b"".join(part.chunks())
        except OSError as error:
            msg = f"cannot publish {part.digest}: {error.strerror}"
            raise WriteFailed(msg) from error

    def quarantine(self, part: CompletePart) -> None:
        self.quarantined.append(self._bytes_of(part))
        if part.path is not None:
            part.path.unlink()

    # -- reading ---------------------------------------------------------------------------

    def open(self, digest: Digest, name: str | None = None) -> BinaryIO:
        held = self.held.get(digest.hex)
        if held is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.describe(digest))
        return io.BytesIO(held.data)

    def describe(self, digest: Digest) -> str:
        return f"memory:{blob_key(digest)}"

    def _found(self, hexadecimal: str, held: Held, name: str | None = None) -> FoundBlob:
        return FoundBlob(
            digest=Digest(hexadecimal),
            size=len(held.data),
            changed_at=held.written_at,
            stamp=held.version,
            location=f"memory:{name or hexadecimal}",
            name=name,
        )

    def find(self, digest: Digest) -> FoundBlob | None:
        held = self.held.get(digest.hex)
        return None if held is None else self._found(digest.hex, held)

    def presence(self, digest: Digest) -> Presence:
        return Presence.BLOB if digest.hex in self.held else Presence.NOTHING

    def verify(self, digest: Digest) -> bool:
        held = self.held.get(digest.hex)
        return held is not None and sha(held.data) == digest.hex

    def inspect_blob(self, digest: Digest, size: int, stamp: bytes | None) -> Inspection:
        held = self.held.get(digest.hex)
        if held is None:
            return Inspection(tampered=Tampered.BLOB_MISSING)
        if held.version == stamp:
            return Inspection(stamp)
        if len(held.data) == size and sha(held.data) == digest.hex:
            return Inspection(held.version, hashed=True)
        found = self._found(digest.hex, held)
        return Inspection(hashed=len(held.data) == size, tampered=Tampered.BAD_BLOB, found=found)

    def renew_stamp(self, digest: Digest, stamp: bytes) -> bytes | None:
        held = self.held.get(digest.hex)
        return stamp if held is not None and held.version == stamp else None

    def blobs(self) -> Iterator[FoundBlob]:
        yield from [self._found(key, held) for key, held in sorted(self.held.items())]

    def hash(self, found: FoundBlob, stop: threading.Event) -> Hashed | None:
        held = self.held.get(found.digest.hex) if found.name is None else self.named.get(found.name)
        if held is None or stop.is_set():
            return None
        return Hashed(self._found(found.digest.hex, held, found.name), sha(held.data))

    # -- damage and the trash --------------------------------------------------------------

    def _take(self, found: FoundBlob) -> Held | None:
        with self._lock:
            held = self.held.get(found.digest.hex)
            if held is None or held.version != found.stamp or held.used:
                return None
            return self.held.pop(found.digest.hex)

    def set_aside(self, found: FoundBlob) -> bool:
        held = self._take(found)
        if held is not None:
            self.quarantined.append(held.data)
        return held is not None

    def move_to_trash(self, found: FoundBlob) -> bool:
        held = self._take(found)
        if held is not None:
            self.trash[found.digest.hex] = held
        return held is not None

    def delete_trashed(self, digest: Digest) -> bool:
        return self.trash.pop(digest.hex, None) is not None

    def restore_trashed(self, digest: Digest) -> None:
        self.held.setdefault(digest.hex, self.trash.pop(digest.hex))

    def trashed(self) -> Iterator[FoundBlob]:
        yield from [self._found(key, held) for key, held in sorted(self.trash.items())]

    # -- names -----------------------------------------------------------------------------

    def check_name(self, wanted: str) -> str:
        parts: list[str] = []
        for part in wanted.split("/"):
            if part == "..":
                if not parts:
                    raise _unusable(wanted)
                parts.pop()
            elif part not in ("", "."):
                parts.append(part)
        if not parts or "\0" in wanted or parts[0] == ".streaming" or parts[:2] == ["blobs", "sha256"]:
            raise _unusable(wanted)
        return "/".join(parts)

    def name(
        self,
        digest: Digest,
        wanted: str,
        *,
        stamp: bytes | None = None,
        recorded: RecordedName | None = None,
        part: CompletePart | None = None,
    ) -> Named:
        path = self.check_name(wanted)
        with self._lock:
            held, there = self.held.get(digest.hex), self.named.get(path)
            if held is None:
                msg = f"cannot make the name {path!r}: there is no blob {digest}"
                raise WriteFailed(msg)
            renewed = None if stamp is None else self.renew_stamp(digest, stamp)
            if there is not None and there.data == held.data:
                return Named(path, renewed, there.version, hashed=recorded is None)
            self.named[path] = mine = Held.new(held.data)
            tampered = kept = None
            if recorded is not None and recorded.path == path:
                tampered = Tampered.NAME_MISSING if there is None else Tampered.BAD_NAME
                if there is not None:
                    self.quarantined.append(there.data)
                    kept = self.quarantine_location
            return Named(path, renewed, mine.version, there is not None, tampered, kept)

    def written_at(self, path: str) -> float | None:
        with suppress(StoreError):
            there = self.named.get(self.check_name(path))
            return None if there is None else there.written_at
        return None

    def was_replaced(self, stored: StoredRepresentation, wanted: str) -> bool:
        there = self.named.get(wanted)
        if stored.name is None or stored.name.path != wanted or there is None:
            return False
        return sha(there.data) != Digest.parse(stored.digest).hex

    def adopt(
        self,
        path: str,
        *,
        noted: NotedFile | None = None,
        checksum: str | None = None,
        stop: threading.Event | None = None,
        alone: bool = False,
    ) -> Adopted:
        there = self.named.get(path)
        if there is None:
            raise NotAdopted(path, "not-found")
        digest = Digest(sha(there.data))
        md5 = hashlib.md5(there.data, usedforsecurity=False).hexdigest()
        if checksum not in (None, digest.hex, md5):
            raise NotAdopted(path, "checksum-mismatch")
        with self._lock:
            held = self.held.setdefault(digest.hex, Held.new(there.data))
        hashed = noted is None or noted.stamp != there.version
        return Adopted(
            path,
            digest,
            len(there.data),
            there.written_at,
            held.version,
            there.version,
            there.version,
            hashed,
        )


def _unusable(wanted: str) -> StoreError:
    return StoreError(f"{wanted!r} is no usable path inside the store", reason="store-unsafe")
