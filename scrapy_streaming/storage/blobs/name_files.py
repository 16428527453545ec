"""The files at the names of a local store: each leads to a blob, or has bytes of its own.

What may live here: reading names, and giving one bytes of its own. ``names`` makes names for blobs.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path, PurePosixPath
from typing import Final

from scrapy_streaming.exceptions import NotAdopted, StoreError
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import StoredRepresentation
from scrapy_streaming.storage import durable
from scrapy_streaming.storage.blobs.base import Survey, blob_key
from scrapy_streaming.storage.blobs.disk import is_plain
from scrapy_streaming.storage.blobs.files import BLOB, BlobFile, BlobFiles
from scrapy_streaming.storage.blobs.paths import NO_NAME, OWN_BLOBS, naming, safe_parts
from scrapy_streaming.storage.blobs.plain import hash_of, info_of, open_plain, stamp_of
from scrapy_streaming.storage.failpoints import failpoint
from scrapy_streaming.storage.leftovers import Leftover, leftover

#: The name of a name's file while it is written.
_ASIDE: Final = re.compile(r"\.[0-9a-f]{32}\.tmp", re.ASCII)


def aside() -> str:
    """Return a new temporary name for a name's file."""
    return f".{secrets.token_hex(16)}.tmp"


class NameFiles(BlobFiles):
    """A local store without ``publish``, ``name`` and ``adopt``, in which the two kinds of it differ."""

    def check_name(self, wanted: str) -> str:
        """Return a path below the root in its shortest form."""
        return "/".join(self.disk.parts_of(wanted))

    # -- reading names ---------------------------------------------------------------------

    def is_taken(self, path: str) -> bool:
        """Return whether anything has the name *path*."""
        try:
            return os.path.lexists(self.root.joinpath(*safe_parts(path)))
        except StoreError:
            return False

    def written_at(self, path: str) -> float | None:
        """Return the time of modification of the file at *path*, in seconds since the epoch."""
        try:
            return os.stat(self.root.joinpath(*safe_parts(path))).st_mtime
        except (FileNotFoundError, NotADirectoryError, StoreError):
            return None
        except OSError as error:
            if error.errno not in NO_NAME | {errno.ELOOP}:
                raise
            return None

    def was_replaced(self, stored: StoredRepresentation, wanted: str) -> bool:
        """Return whether *wanted* is the recorded name and has other bytes than the recorded ones."""
        if stored.name is None or stored.name.path != wanted:
            return False
        with self.disk.folder_of(wanted) as (folder, last):
            info = None if folder is None else info_of(last, folder)
            digest = Digest.parse(stored.digest)
            if info is None or not is_plain(info) or self.is_same_file(digest, info):
                return False
            if stamp_of(info) == stored.name.stamp and info.st_size == stored.size:
                return False
            return hash_of(last, folder)[0] not in (None, digest.hex)

    def copy_of(self, digest: Digest, path: str) -> BlobFile | None:
        """Return the file at the blob's name *path*; ``None`` if it is missing, or the blob's own file."""
        with self.disk.folder_of(path) as (folder, last):
            info = None if folder is None else info_of(last, folder)
        if info is None or not is_plain(info) or self.is_same_file(digest, info):
            return None
        return BlobFile.of(digest, self.root / path, info, path)

    def open_linked(self, folder: int, last: str) -> int | None:
        """Open the blob that a symbolic link of a name leads to; ``None`` for any other link."""
        try:
            hexadecimal = PurePosixPath(os.readlink(last, dir_fd=folder)).name
            if BLOB.fullmatch(hexadecimal) is None:
                return None
            there = os.stat(last, dir_fd=folder)
        except OSError:
            return None
        fd = open_plain(self.path(Digest(hexadecimal)))
        if fd is not None and not os.path.samestat(os.fstat(fd), there):
            os.close(fd)
            return None
        return fd

    def open_name(self, path: str, folder: int, last: str) -> int:
        """Open the file, or the blob, that a name leads to; raise ``NotAdopted`` for anything else."""
        try:
            fd = open_plain(last, folder)
        except PermissionError as error:
            raise NotAdopted(path, "unreadable") from error
        if fd is None:
            fd = self.open_linked(folder, last)
        if fd is None:
            raise NotAdopted(path, "not-found" if info_of(last, folder) is None else "not-regular")
        return fd

    # -- for maintenance -------------------------------------------------------------------

    def names(self, spared: Collection[Path] = ()) -> Iterator[str]:
        """Yield the paths of all files below the root, folder by folder.

        Left out are the package's own folders, temporary names of killed processes, and *spared*. A folder
        that cannot be read is yielded itself.
        """
        root = self.root.resolve()
        own = [path.resolve() for path in (self.disk.quarantine.parent, *spared)]
        skipped = {str(path) for path in (*own, *(root.joinpath(*parts) for parts in OWN_BLOBS))}
        folders = [str(root)]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(folder) as entries:
                    found = sorted(entries, key=lambda entry: entry.name)
            except PermissionError:
                yield os.path.relpath(folder, root)
                continue
            for entry in found:
                if entry.path in skipped or _ASIDE.fullmatch(entry.name):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    yield os.path.relpath(entry.path, root)

    def survey(self) -> Survey:
        """Return which blobs symbolic links in the store lead to, and what killed processes left in it."""
        linked: set[str] = set()
        leftovers: list[Leftover] = []
        for path, info in self._walk():
            if stat.S_ISLNK(info.st_mode):
                with suppress(OSError):  # gone meanwhile
                    linked.add(os.path.basename(os.readlink(path)))
            if _ASIDE.fullmatch(path.name) and not stat.S_ISDIR(info.st_mode):
                leftovers.append(leftover(path, info))
        leftovers += self.blobs_aside()
        return Survey(frozenset(name for name in linked if BLOB.fullmatch(name)), tuple(leftovers))

    def _walk(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Yield all paths below the root except the package's own folders, each with its ``lstat``."""
        root, own = self.root.resolve(), self.disk.quarantine.parent.resolve()
        for where, folders, files in os.walk(root):
            here = Path(where)
            blobs = {name for _, name in OWN_BLOBS} if here == root / "blobs" else set()
            folders[:] = [name for name in folders if here / name != own and name not in blobs]
            for name in (*files, *folders):
                with suppress(OSError):  # gone meanwhile
                    yield here / name, os.lstat(here / name)

    def shared_sizes(self) -> Callable[[str], int | None]:
        """Return a function from a name to the size of the blob whose file it is, or links to."""
        inodes = self.shared_inodes()

        def size_of(path: str) -> int | None:
            with self.disk.folder_of(path) as (folder, last):
                info = None if folder is None else info_of(last, folder)
                if folder is None or info is None:
                    return None
                if is_plain(info):
                    return info.st_size if info.st_nlink > 1 and info.st_ino in inodes else None
                return self._linked_size(path, folder, last) if stat.S_ISLNK(info.st_mode) else None

        return size_of

    def _linked_size(self, path: str, folder: int, last: str) -> int | None:
        """Return the size of the blob that a link leads to, ``None`` if it leads elsewhere.

        Raises ``NotAdopted`` if that blob is missing.
        """
        fd = self.open_linked(folder, last)
        if fd is None:
            self._refuse_dangling(path, os.readlink(last, dir_fd=folder))
            return None
        try:
            return os.fstat(fd).st_size
        finally:
            os.close(fd)

    @staticmethod
    def _refuse_dangling(path: str, target: str) -> None:
        """Raise ``NotAdopted`` if *target* is a blob, which is missing; other links are the user's."""
        hexadecimal = PurePosixPath(target).name
        if BLOB.fullmatch(hexadecimal) is None:
            return
        if target == "../" * (len(safe_parts(path)) - 1) + blob_key(Digest(hexadecimal)):
            raise NotAdopted(path, "blob-missing")

    # -- a name's own bytes ----------------------------------------------------------------

    def give_own(self, path: str, digest: Digest | None = None) -> None:
        """Give the name *path* a file of its own, with the bytes that it leads to or those of a blob."""
        *folders, last = self.disk.parts_of(path)
        with naming(path):
            folder = self.disk.make_folder(tuple(folders), lasting=True)
            try:
                source = self._source_of(path, folder, last, digest)
                try:
                    self._own_aside(source, folder, last)
                finally:
                    os.close(source)
                self.disk.sync(folder)
            finally:
                os.close(folder)

    def _source_of(self, path: str, folder: int, last: str, digest: Digest | None) -> int:
        if digest is None:
            return self.open_name(path, folder, last)
        if not self.verify(digest) or (fd := open_plain(self.path(digest))) is None:
            raise NotAdopted(path, "bad-blob" if os.path.lexists(self.path(digest)) else "blob-missing")
        return fd

    def _own_aside(self, source: int, folder: int, last: str) -> None:
        """Copy *source* to a file with a temporary name, and move that to the name."""
        temporary, info = aside(), os.fstat(source)
        with ExitStack() as undo:
            undo.callback(durable.unlink, temporary, folder)
            fd = self.disk.clone(source, temporary, folder)
            if fd is None:
                fd = self.disk.copy(source, temporary, folder)
            undo.callback(os.close, fd)
            if info.st_mode & stat.S_IWUSR:  # a read-only blob does not make a name read-only
                os.fchmod(fd, stat.S_IMODE(info.st_mode))
            if os.geteuid() == 0:
                os.fchown(fd, info.st_uid, info.st_gid)
            self.disk.sync(fd)
            failpoint("name-made")
            os.rename(temporary, last, src_dir_fd=folder, dst_dir_fd=folder)
