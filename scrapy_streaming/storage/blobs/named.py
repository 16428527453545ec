"""The store without blobs, used while publishing by content is switched off.

What may live here: how a complete part becomes the file of a name, atomically, and how that file is
verified later. The bytes exist nowhere else, so the file is as durable as a blob.
"""

from __future__ import annotations

import os
import stat
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from scrapy_streaming.exceptions import IntegrityError, StoreError
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import NotedFile, RecordedName, StoredRepresentation
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage import durable
from scrapy_streaming.storage.blobs.adoption import AdoptionOptions, ForeignFile, adopt
from scrapy_streaming.storage.blobs.base import Adopted, Inspection, Named, Published, Tampered
from scrapy_streaming.storage.blobs.disk import is_plain
from scrapy_streaming.storage.blobs.name_files import NameFiles, aside
from scrapy_streaming.storage.blobs.names import Place
from scrapy_streaming.storage.blobs.paths import naming
from scrapy_streaming.storage.blobs.plain import READ, hash_of, info_of, stamp_of
from scrapy_streaming.storage.complete_part import READ_SIZE, CompletePart
from scrapy_streaming.storage.failpoints import failpoint


class NamesOnlyStore(NameFiles):
    """Gives each name a file of its own. Blobs from earlier crawls stay as they are."""

    keeps_blobs = False

    @classmethod
    def serves(cls, settings: StreamingSettings) -> bool:
        """Return whether STREAMING_FINALIZATION_ENABLED is off."""
        return not settings.finalization_enabled

    @classmethod
    def from_settings(cls, settings: StreamingSettings, root: Path, quarantine: Path) -> Self:
        """Return the store at *root*."""
        return cls(root, quarantine, fsync=settings.fsync)

    def publish(self, part: CompletePart) -> Published:
        """Return the digest; ``name`` stores the bytes."""
        return Published(part.digest, part.length, False)

    def local_file(self, digest: Digest, name: str | None = None) -> Path:
        """Return the file of a name; raise ``StoreError`` (``finalization-off``) for bytes that have none."""
        if name is None:
            msg = f"{digest} has no name, and blobs are off: set STREAMING_FINALIZATION_ENABLED=True"
            raise StoreError(msg, reason="finalization-off")
        return self.root / name

    def inspect(self, stored: StoredRepresentation) -> Inspection:
        """Return whether the file at the recorded name exists and its bytes are right (R77).

        Its stamp is that of the name, or the blob's if the name is a blob's own file. Without a recorded
        name nothing is stored, and both ``stamp`` and ``tampered`` are ``None``.
        """
        if stored.name is None:
            return Inspection()
        path = self.root / stored.name.path
        try:
            info = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return Inspection(tampered=Tampered.NAME_MISSING)
        if not is_plain(info) or info.st_size != stored.size:
            return Inspection(tampered=Tampered.BAD_NAME)
        if stamp_of(info) in (stored.name.stamp, stored.stamp):
            return Inspection(stamp_of(info))
        hexadecimal, now = hash_of(path)
        if now is not None and hexadecimal == Digest.parse(stored.digest).hex:
            return Inspection(stamp_of(now), hashed=True)
        return Inspection(hashed=True, tampered=Tampered.BAD_NAME)

    def keep_replaced(self, stored: StoredRepresentation) -> str | None:
        """Keep the bytes that replaced those of a recorded name in quarantine; return where."""
        if stored.name is None:
            return None
        *folders, last = self.disk.parts_of(stored.name.path)
        digest = Digest.parse(stored.digest)
        with naming(stored.name.path):
            folder = self.disk.make_folder(tuple(folders), lasting=False)
            try:
                there = _plain_file(folder, last)
                if there is None or self.disk.is_quarantined(digest, there):
                    return None
                return _text(self.disk.keep_name(last, folder, digest))
            finally:
                os.close(folder)

    def adopt(
        self,
        path: str,
        *,
        noted: NotedFile | None = None,
        checksum: str | None = None,
        stop: threading.Event | None = None,
        alone: bool = False,
    ) -> Adopted:
        """Return the description of a file that another program stored; it stays as it is."""
        return adopt(self, path, AdoptionOptions(noted, checksum, stop, alone), _leave)

    # -- names -----------------------------------------------------------------------------

    def name(
        self,
        digest: Digest,
        wanted: str,
        *,
        stamp: bytes | None = None,  # noqa: ARG002 - there is no blob
        recorded: RecordedName | None = None,
        part: CompletePart | None = None,
    ) -> Named:
        """Store the bytes of *part*, or of the name *recorded*, at the name *wanted*, durably."""
        *folders, last = parts = self.disk.parts_of(wanted)
        wanted = "/".join(parts)
        with naming(wanted):
            folder = self.disk.make_folder(tuple(folders), lasting=True)
            try:
                return self._name(Place(folder, last, digest, len(folders), part), wanted, recorded)
            finally:
                os.close(folder)

    def _name(self, place: Place, wanted: str, recorded: RecordedName | None) -> Named:
        is_recorded = recorded is not None and recorded.path == wanted
        there = _plain_file(place.folder, place.last)
        if there is not None and recorded is not None and is_recorded and stamp_of(there) == recorded.stamp:
            return Named(wanted, own_stamp=recorded.stamp)
        if there is not None:
            hexadecimal, now = hash_of(place.last, place.folder)
            if now is not None and hexadecimal == place.digest.hex:
                return Named(wanted, own_stamp=stamp_of(now), hashed=True)
        tampered = kept = None
        if is_recorded:
            tampered = Tampered.NAME_MISSING if there is None else Tampered.BAD_NAME
            kept = None if there is None else self.disk.keep_name(place.last, place.folder, place.digest)
        own = self._make(place, recorded)
        return Named(wanted, own_stamp=own, hashed=there is not None, tampered=tampered, kept=_text(kept))

    def _make(self, place: Place, recorded: RecordedName | None) -> bytes:
        """Make the file under a temporary name and move it to its name; return its stamp."""
        temporary = aside()
        with ExitStack() as undo:
            undo.callback(durable.unlink, temporary, place.folder)
            self._make_aside(place, temporary, recorded)
            fd = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place.folder)
            undo.callback(os.close, fd)
            failpoint("name-made")
            os.rename(temporary, place.last, src_dir_fd=place.folder, dst_dir_fd=place.folder)
            failpoint("name-moved")
            self.disk.sync(place.folder)
            return stamp_of(os.fstat(fd))

    def _make_aside(self, place: Place, temporary: str, recorded: RecordedName | None) -> None:
        part = place.part
        if part is None:
            if recorded is None:
                msg = f"there are no stored bytes to make {place.last!r} from"
                raise IntegrityError(msg)
            self._copy(place, temporary, self.root / recorded.path)
        elif part.data is not None:
            self.disk.write(place.folder, temporary, [part.data], place.digest)
        elif part.path is not None and not self._move(place, part.path, temporary):
            self._copy(place, temporary, part.path)

    def _move(self, place: Place, source: Path, temporary: str) -> bool:
        """Move the part's file; return whether that was done: not from another file system.

        Raises ``IntegrityError`` if it is not a regular file of the part's length.
        """
        fd = os.open(source, READ)
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode) or place.part is None or info.st_size != place.part.length:
                msg = f"{source} is not a regular file of the bytes that were received"
                raise IntegrityError(msg, reason="length-mismatch")
            if info.st_nlink > 1:
                return False
            self.disk.finish(fd)
            os.rename(source, temporary, dst_dir_fd=place.folder)
        except OSError as error:
            if error.errno not in durable.NO_LINK:
                raise
            return False
        finally:
            os.close(fd)
        return True

    def _copy(self, place: Place, temporary: str, source: Path) -> None:
        with open(source, "rb") as stream:
            chunks = iter(lambda: stream.read(READ_SIZE), b"")
            self.disk.write(place.folder, temporary, chunks, place.digest)


def _leave(_digest: Digest, file: ForeignFile, info: os.stat_result, _alone: bool) -> Named:
    """Leave a file that another program stored as it is."""
    return Named(file.path, own_stamp=stamp_of(info))


def _plain_file(folder: int, last: str) -> os.stat_result | None:
    """Return the ``lstat`` of the regular file *last*; ``None`` if there is none."""
    info = info_of(last, folder)
    return info if info is not None and is_plain(info) else None


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
