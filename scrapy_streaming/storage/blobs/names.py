"""Naming a blob: a link, a clone or a copy, made under a temporary name and moved (storage rule 13).

What may live here: the link modes, and the treatment of a file that is at the name already.
"""

from __future__ import annotations

import os
import stat
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Final

from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import RecordedName
from scrapy_streaming.storage import durable
from scrapy_streaming.storage.blobs.base import Named, Tampered, blob_key
from scrapy_streaming.storage.blobs.disk import is_plain
from scrapy_streaming.storage.blobs.name_files import NameFiles, aside
from scrapy_streaming.storage.blobs.paths import naming
from scrapy_streaming.storage.blobs.plain import hash_of, info_of, stamp_of
from scrapy_streaming.storage.blobs.publishing import TRIES
from scrapy_streaming.storage.complete_part import CompletePart
from scrapy_streaming.storage.failpoints import failpoint

#: Seconds before the next attempt to name a blob that ``gc`` has moved to the trash and may put back.
PAUSE: Final = 0.01


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a name: ``last`` in the open directory ``folder``, ``depth`` folders below the root.

    ``part`` is what the blob *digest* was made from, if it is known.
    """

    folder: int
    last: str
    digest: Digest
    depth: int
    part: CompletePart | None

    def part_linked(self, blob: os.stat_result) -> bool:
        """Return whether the part's file is still the blob's, by a link."""
        if self.part is None or self.part.path is None:
            return False
        try:
            return os.path.samestat(os.lstat(self.part.path), blob)
        except FileNotFoundError:
            return False


@dataclass(frozen=True, slots=True)
class _Occupant:
    """A file at a name that is not the blob's.

    ``right``: it has the blob's bytes. ``kept``: it need not be kept, since its bytes are in another blob or
    in quarantine.
    """

    stamp: bytes | None = None
    hashed: bool = False
    right: bool = False
    kept: bool = False


class Namer:
    """Makes the names of one local store."""

    def __init__(self, blobs: NameFiles) -> None:
        self._blobs = blobs
        self._disk = blobs.disk
        self._mode = blobs.disk.link_mode

    def name(
        self,
        digest: Digest,
        wanted: str,
        stamp: bytes | None = None,
        recorded: RecordedName | None = None,
        part: CompletePart | None = None,
    ) -> Named:
        """Make *wanted* a name of the blob; arguments and errors as of ``BlobStore.name``.

        With link mode ``none`` no name is made, and the blob's own path is returned.
        """
        if self._mode == "none":
            return Named(blob_key(digest), stamp)
        *folders, last = parts = self._disk.parts_of(wanted)
        wanted = "/".join(parts)
        with naming(wanted):
            folder = self._disk.make_folder(tuple(folders), lasting=False)
            try:
                named = self._try_to_name(Place(folder, last, digest, len(folders), part), wanted, recorded)
            finally:
                os.close(folder)
        if named.stamp is not None and named.stamp == stamp:
            return named
        return replace(named, stamp=None if stamp is None else self._blobs.renew_stamp(digest, stamp))

    def _try_to_name(self, place: Place, wanted: str, recorded: RecordedName | None) -> Named:
        """Make the name; try again while ``gc`` has the blob in the trash and may put it back."""
        for left in reversed(range(TRIES)):
            try:
                return self._name(place, wanted, recorded)
            except FileNotFoundError:
                if not left or os.path.lexists(self._blobs.path(place.digest)):
                    raise
            time.sleep(PAUSE)
        raise AssertionError  # the last try returns or raises

    def _name(self, place: Place, wanted: str, recorded: RecordedName | None) -> Named:
        blob = os.stat(self._blobs.path(place.digest))
        links = 1 + place.part_linked(blob)  # of the blob's file, without those of names
        try:
            found = os.stat(place.last, dir_fd=place.folder)
        except OSError:  # missing, or a link without a target, which is replaced and never followed
            found = None
        if found is not None and os.path.samestat(found, blob):
            return self._name_of_file(place, wanted, found, links)
        occupant = self._occupant(place, blob, recorded)
        if occupant is None:
            gone = recorded is not None and recorded.path == wanted
            own = self._make(place, links)
            return Named(wanted, own_stamp=own, tampered=Tampered.NAME_MISSING if gone else None)
        if occupant.right and self._mode not in ("hardlink", "symlink"):
            linked = occupant.hashed and blob.st_nlink == links and self._link_instead(place, links)
            return Named(wanted, own_stamp=None if linked else occupant.stamp, hashed=occupant.hashed)
        bad = not occupant.right and recorded is not None and not occupant.kept
        kept = self._disk.keep_name(place.last, place.folder, place.digest) if bad else None
        own = self._make(place, links)
        tampered = Tampered.BAD_NAME if bad else None
        where = None if kept is None else str(kept)
        return Named(wanted, own_stamp=own, hashed=occupant.hashed, tampered=tampered, kept=where)

    def _name_of_file(self, place: Place, wanted: str, found: os.stat_result, links: int) -> Named:
        """Return a name that is the blob's file; in ``auto`` only the first name may stay so."""
        if self._mode != "auto":
            return Named(wanted, stamp_of(found))
        if found.st_nlink <= links + 1:
            self._make_writable(place.digest, found)
            return Named(wanted, stamp_of(found))
        return Named(wanted, own_stamp=self._make(place, links))

    def _occupant(
        self, place: Place, blob: os.stat_result, recorded: RecordedName | None
    ) -> _Occupant | None:
        """Return the file at a name, which is not the blob's; ``None`` if there is none.

        Its bytes are read if its stamp has changed: they may be the blob's, or exist nowhere else.
        """
        info = info_of(place.last, place.folder)
        if info is None:
            return None
        if not is_plain(info):
            return _Occupant(kept=stat.S_ISDIR(info.st_mode))  # a folder is not replaced, nor kept
        if recorded is not None and stamp_of(info) == recorded.stamp and info.st_size == blob.st_size:
            return _Occupant(stamp_of(info), right=True)
        if recorded is None and info.st_size != blob.st_size:
            return _Occupant()
        hexadecimal, now = hash_of(place.last, place.folder)
        if hexadecimal is None or now is None:
            return _Occupant(hashed=True)
        right = hexadecimal == place.digest.hex
        other = Digest(hexadecimal)
        kept = self._blobs.has(other, now.st_size) or self._disk.is_quarantined(place.digest, now)
        return _Occupant(stamp_of(now), True, right, kept)

    # -- making one ------------------------------------------------------------------------

    def _make(self, place: Place, links: int) -> bytes | None:
        """Make the name under a temporary one and move it; return the stamp of a file of its own."""
        temporary = aside()
        with ExitStack() as undo:
            # also after the rename, which does nothing if both are links to one inode
            undo.callback(durable.unlink, temporary, place.folder)
            fd = self._make_aside(place, temporary, links)
            if fd is not None:
                undo.callback(os.close, fd)
            failpoint("name-made")
            os.rename(temporary, place.last, src_dir_fd=place.folder, dst_dir_fd=place.folder)
            failpoint("name-moved")
            # by descriptor: another worker may have replaced the name already
            return None if fd is None else stamp_of(os.fstat(fd))

    def _make_aside(self, place: Place, temporary: str, links: int) -> int | None:
        """Make the name's file under *temporary*; return a descriptor if it is a file of its own."""
        blob = self._blobs.path(place.digest)
        if self._mode == "symlink":
            os.symlink("../" * place.depth + blob_key(place.digest), temporary, dir_fd=place.folder)
            return None
        if self._disk.clones:
            with open(blob, "rb") as source:
                fd = self._disk.clone(source.fileno(), temporary, place.folder)
            self._disk.clones = fd is not None
            if fd is not None:
                return fd
        if self._link(place, temporary, links):
            return None
        with open(blob, "rb") as source:
            return self._disk.copy(source.fileno(), temporary, place.folder)

    def _link(self, place: Place, temporary: str, links: int) -> bool:
        """Link the blob's file, in ``auto`` for the first name only; return whether that was done.

        If another publisher replaces a bad blob meanwhile, the file to link has no name any more, which the
        system reports as ``FileNotFoundError``; then the link is tried again. If two processes link at the
        same time, each may count the other's name, and both copy.
        """
        if self._mode not in ("auto", "hardlink"):
            return False
        blob = self._blobs.path(place.digest)
        for _ in range(TRIES):
            try:
                if self._mode == "auto" and os.stat(blob).st_nlink > links:  # it has its first name
                    return False
                os.link(blob, temporary, dst_dir_fd=place.folder, follow_symlinks=False)
            except FileNotFoundError:
                if not os.path.lexists(blob):
                    raise
            except OSError as error:
                if error.errno not in durable.NO_LINK:
                    raise
                return False
            else:
                return self._mode == "hardlink" or self._keep_if_first(place, temporary, links)
        return False

    def _keep_if_first(self, place: Place, temporary: str, links: int) -> bool:
        """Remove a link just made unless it is the blob's first name; return whether it is."""
        info = os.stat(temporary, dir_fd=place.folder, follow_symlinks=False)
        if info.st_nlink > links + 1:
            os.unlink(temporary, dir_fd=place.folder)
            return False
        self._make_writable(place.digest, info)
        return True

    def _link_instead(self, place: Place, links: int) -> bool:
        """Replace a copy by the blob's first link, which saves space; return whether that was done."""
        if self._mode != "auto" or self._disk.clones:
            return False
        temporary = aside()
        if not self._link(place, temporary, links):
            return False
        os.rename(temporary, place.last, src_dir_fd=place.folder, dst_dir_fd=place.folder)
        return True

    def _make_writable(self, digest: Digest, info: os.stat_result) -> None:
        """Make a blob that was published in another link mode writable, as names of ``auto`` are."""
        if not info.st_mode & stat.S_IWUSR:
            with suppress(PermissionError):  # another user's file
                os.chmod(self._blobs.path(digest), self._disk.mode)
