"""Blobs on the local file system: ``blobs/sha256/ab/<hex>``, with names beside them.

What may live here: the composition of publishing, naming and adoption to one store.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import Self

from scrapy_streaming.exceptions import NotAdopted
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import NotedFile, RecordedName, StoredRepresentation
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage.blobs.adoption import Adopter, AdoptionOptions, adopt
from scrapy_streaming.storage.blobs.base import Adopted, Inspection, Named, Published, Tampered
from scrapy_streaming.storage.blobs.name_files import NameFiles
from scrapy_streaming.storage.blobs.names import Namer
from scrapy_streaming.storage.blobs.publishing import Publisher
from scrapy_streaming.storage.complete_part import CompletePart


class LocalBlobStore(NameFiles):
    """A store on one local file system; *link_mode* is STREAMING_LINK_MODE."""

    def __init__(self, root: Path, quarantine: Path, *, fsync: bool = True, link_mode: str = "auto") -> None:
        super().__init__(root, quarantine, fsync=fsync, link_mode=link_mode)
        self.makes_names = link_mode != "none"
        self._publisher = Publisher(self)
        self._namer = Namer(self)
        self._adopter = Adopter(self, self._publisher, self._namer)

    @classmethod
    def serves(cls, settings: StreamingSettings) -> bool:
        """Return whether FILES_STORE is a local folder."""
        return settings.store is not None

    @classmethod
    def from_settings(cls, settings: StreamingSettings, root: Path, quarantine: Path) -> Self:
        """Return the store at *root*."""
        return cls(root, quarantine, fsync=settings.fsync, link_mode=settings.link_mode)

    def publish(self, part: CompletePart) -> Published:
        """Make the part's bytes a blob, durably and atomically."""
        return self._publisher.publish(part)

    def inspect(self, stored: StoredRepresentation) -> Inspection:
        """Return whether stored bytes exist and are right.

        A missing blob is made again from the recorded name if that has its bytes, as after crawls without
        publishing by content, or if ``blobs`` was removed.
        """
        found = super().inspect(stored)
        if found.tampered is Tampered.BLOB_MISSING and stored.name is not None:
            with suppress(NotAdopted):
                again = self.adopt(stored.name.path, checksum=Digest.parse(stored.digest).hex)
                return Inspection(again.stamp, hashed=True, restored=True)
        return found

    def name(
        self,
        digest: Digest,
        wanted: str,
        *,
        stamp: bytes | None = None,
        recorded: RecordedName | None = None,
        part: CompletePart | None = None,
    ) -> Named:
        """Make *wanted* (a path below the root) a name of the blob, by the link mode."""
        return self._namer.name(digest, wanted, stamp, recorded, part)

    def adopt(
        self,
        path: str,
        *,
        noted: NotedFile | None = None,
        checksum: str | None = None,
        stop: threading.Event | None = None,
        alone: bool = False,
    ) -> Adopted:
        """Make a blob of the file that another program stored at the name *path*."""
        return adopt(self, path, AdoptionOptions(noted, checksum, stop, alone), self._adopter.make_blob)
