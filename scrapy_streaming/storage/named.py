"""Files under their names and nowhere else: in the blobs' place while publishing by content is off.

What may live here: how a finished part becomes a name's own file, whole or not at all, and how that file
is known again. A name is all there is of its bytes, so it is as durable as a blob.
"""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import ExitStack, suppress
from pathlib import Path

from scrapy_streaming.exceptions import IntegrityError, StoreError
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import RecordedName, StoredRepresentation
from scrapy_streaming.storage.blobs import (
    NO_LINK,
    LocalBlobStore,
    Look,
    Named,
    Place,
    Published,
    Stray,
    Tampered,
    hash_of,
    naming,
    stamp_of,
)
from scrapy_streaming.storage.complete_part import READ_SIZE, CompletePart
from scrapy_streaming.storage.failpoints import failpoint


class NamedFiles(LocalBlobStore):
    """Each name has a file of its own. Blobs that are there from before are left as they are."""

    def publish(self, part: CompletePart) -> Published:
        """Return what is to be published: it is when it gets its name."""
        return Published(part.digest, part.length, False)

    def place(self, digest: Digest, name: str | None) -> Path:
        """Return the file of a name; raise ``StoreError`` (``finalization-off``) for bytes that have none."""
        if name is None:
            msg = f"{digest} has no name, and blobs are off: set STREAMING_FINALIZATION_ENABLED=True"
            raise StoreError(msg, reason="finalization-off")
        return self.root / name

    def look_at(self, known: StoredRepresentation) -> Look:
        """Return whether the file under the recorded name is there and its bytes are right (R77).

        Its stamp is that of the name, or, for a name of a blob's own file, the blob's. A job that has
        no name for these bytes has none of them.
        """
        if known.name is None:
            return Look()
        path = self.root / known.name.path
        try:
            info = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return Look(tampered=Tampered.NAME_MISSING)
        if not stat.S_ISREG(info.st_mode) or info.st_size != known.size:
            return Look(tampered=Tampered.BAD_NAME)
        if stamp_of(info) in (known.name.stamp, known.stamp):
            return Look(stamp_of(info))
        hexadecimal, now = hash_of(path)
        if now is not None and hexadecimal == Digest.parse(known.digest).hex:
            return Look(stamp_of(now), hashed=True)
        return Look(hashed=True, tampered=Tampered.BAD_NAME)

    def keep(self, known: StoredRepresentation) -> Path | None:
        """Keep in quarantine what stands under the name of *known* in the place of its bytes."""
        if known.name is None:
            return None
        *folders, last = self.parts_of(known.name.path)
        digest = Digest.parse(known.digest)
        with naming(known.name.path):
            folder = self._descend(tuple(folders), durable=False)
            try:
                place = Place(folder, last, digest, len(folders), None)
                there = self._plain_file(place)
                if there is None or self._is_aside(digest, there):
                    return None
                return self._keep_name(place)
            finally:
                os.close(folder)

    def _make_stored(self, digest: Digest, found: Stray, info: os.stat_result, *, alone: bool) -> Named:  # noqa: ARG002 - LocalBlobStore calls it
        """Leave a file that another program stored as it is."""
        return Named(found.path, own=stamp_of(info))

    def name(
        self,
        digest: Digest,
        wanted: str,
        *,
        stamp: bytes | None = None,  # noqa: ARG002 - LocalBlobStore's signature; there is no blob
        recorded: RecordedName | None = None,
        part: CompletePart | None = None,
    ) -> Named:
        """Give the bytes of *part*, or those that *recorded* names, the name *wanted*, durably.

        Atomic: a reader sees the old bytes or the new, never none (storage rule 13). Other bytes that stand
        where *recorded* led to these are kept in quarantine (R77). Raises as ``LocalBlobStore.name``.
        """
        *folders, last = parts = self.parts_of(wanted)
        wanted = "/".join(parts)
        with naming(wanted):
            folder = self._descend(tuple(folders), durable=self.fsync)
            try:
                return self._name_file(Place(folder, last, digest, len(folders), part), wanted, recorded)
            finally:
                os.close(folder)

    def _name_file(self, place: Place, wanted: str, recorded: RecordedName | None) -> Named:
        was_ours = recorded is not None and recorded.path == wanted
        there = self._plain_file(place)
        if there is not None and was_ours and recorded is not None and stamp_of(there) == recorded.stamp:
            return Named(wanted, own=recorded.stamp)
        if there is not None:
            hexadecimal, now = hash_of(place.last, place.folder)
            if now is not None and hexadecimal == place.digest.hex:
                return Named(wanted, own=stamp_of(now), hashed=True)
        tampered = kept = None
        if was_ours:
            tampered = Tampered.NAME_MISSING if there is None else Tampered.BAD_NAME
            kept = None if there is None else self._keep_name(place)
        own = self._make(place, recorded)
        return Named(wanted, own=own, hashed=there is not None, tampered=tampered, kept=kept)

    @staticmethod
    def _plain_file(place: Place) -> os.stat_result | None:
        """Return what is known of the plain file that has the name."""
        try:
            info = os.stat(place.last, dir_fd=place.folder, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return info if stat.S_ISREG(info.st_mode) else None

    def _make(self, place: Place, recorded: RecordedName | None) -> bytes:
        """Make the file aside and move it into place; return its stamp."""
        temporary = f".{secrets.token_hex(16)}.tmp"
        with ExitStack() as undo:
            undo.callback(_unlink, temporary, place.folder)
            self._make_aside(place, temporary, recorded)
            fd = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place.folder)
            undo.callback(os.close, fd)
            failpoint("name-made")
            os.rename(temporary, place.last, src_dir_fd=place.folder, dst_dir_fd=place.folder)
            failpoint("name-moved")
            self._sync(place.folder)
            return stamp_of(os.fstat(fd))

    def _make_aside(self, place: Place, temporary: str, recorded: RecordedName | None) -> None:
        part = place.part
        if part is None:
            if recorded is None:
                msg = f"nothing is there that {place.last!r} could be made of"
                raise IntegrityError(msg)
            self._copy(place, temporary, self.root / recorded.path)
        elif part.data is not None:
            self._write_aside(place.folder, temporary, [part.data], place.digest)
        elif part.path is not None and not self._moved(place, part.path, temporary):
            self._copy(place, temporary, part.path)

    def _moved(self, place: Place, source: Path, temporary: str) -> bool:
        """Whether the part's file itself could be taken; not from another filesystem."""
        fd = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode) or place.part is None or info.st_size != place.part.length:
                msg = f"{source} does not hold the bytes that were counted"
                raise IntegrityError(msg, reason="length-mismatch")
            if info.st_nlink > 1:
                return False
            self._settle(fd)
            os.rename(source, temporary, dst_dir_fd=place.folder)
        except OSError as error:
            if error.errno not in NO_LINK:
                raise
            return False
        finally:
            os.close(fd)
        return True

    def _copy(self, place: Place, temporary: str, source: Path) -> None:
        with open(source, "rb") as stream:
            chunks = iter(lambda: stream.read(READ_SIZE), b"")
            self._write_aside(place.folder, temporary, chunks, place.digest)


def _unlink(name: str, folder: int) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
