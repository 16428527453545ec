"""One store's folders on a local file system, and the writing of whole files into them.

What may live here: opening folders below the root step by step, never through a link; making a file under
a temporary name and moving it into place. Nothing here depends on whether a file is a blob or a name.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from scrapy_streaming.exceptions import IntegrityError, StoreError
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.storage import durable
from scrapy_streaming.storage.blobs.paths import safe_parts, unusable
from scrapy_streaming.storage.blobs.plain import (
    ASIDE,
    DIRECTORY,
    NO_CLONE,
    NOT_THERE,
    clone_bytes,
    copy_bytes,
    keep_copy,
    set_time_to_now,
    umask,
)
from scrapy_streaming.storage.failpoints import failpoint


class Disk:
    """The folders of one store: *root*, and *quarantine* for damaged bytes.

    ``mode`` are the permissions of finished files. ``clones``: whether to try clones, which share their
    extents with the original; false once the file system has refused one.
    """

    def __init__(self, root: Path, quarantine: Path, *, fsync: bool, link_mode: str) -> None:
        self.root = root
        self.quarantine = quarantine
        self.fsync = fsync
        self.link_mode = link_mode
        self.clones = link_mode in ("auto", "reflink")
        # in auto, names share the blob's file: as writable as FilesPipeline's, for users who edit one
        self.mode = 0o666 & ~umask() if link_mode == "auto" else 0o444
        self.fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._own = _components(root, quarantine.parent)
        self._durable: set[str] = set()

    def close(self) -> None:
        """Close the root."""
        os.close(self.fd)

    # -- folders ---------------------------------------------------------------------------

    def parts_of(self, wanted: str | os.PathLike[str]) -> tuple[str, ...]:
        """Return the components of a path below the root; raise as ``BlobStore.check_name``."""
        parts = safe_parts(wanted)
        if self._is_own(parts):
            raise unusable(wanted)
        return parts

    def _is_own(self, parts: tuple[str, ...]) -> bool:
        return bool(self._own) and parts[: len(self._own)] == self._own

    def make_folder(self, names: tuple[str, ...], *, lasting: bool) -> int:
        """Return a descriptor of a folder below the root; make the missing ones (E2).

        *lasting*: each new folder is synced in its parent. Raises ``StoreError`` (``store-unsafe``) if a
        component is a symbolic link or not a folder, ``OSError``, ``WriteFailed``.
        """
        current = os.open(".", DIRECTORY, dir_fd=self.fd)
        for depth in range(1, len(names) + 1):
            try:
                below = self._step(current, names[:depth], lasting=lasting and self.fsync)
            finally:
                os.close(current)
            current = below
        return current

    def _step(self, current: int, names: tuple[str, ...], *, lasting: bool) -> int:
        made = True
        try:
            os.mkdir(names[-1], dir_fd=current)
            failpoint("folder-made")
        except FileExistsError:
            made = False
        path = "/".join(names)
        if lasting and (made or path not in self._durable):
            self.sync(current)
            self._durable.add(path)
        try:
            return os.open(names[-1], DIRECTORY, dir_fd=current)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            msg = f"{self.root / path} is not a plain directory; nothing was written through it"
            raise StoreError(msg, reason="store-unsafe") from error

    @contextmanager
    def folder_of(self, path: str) -> Iterator[tuple[int | None, str]]:
        """Yield a descriptor of the folder of the name *path*, and the path's last component.

        The descriptor is ``None`` if there is no such folder, or *path* cannot be a name.
        """
        try:
            *folders, last = safe_parts(path)
        except StoreError:
            yield None, ""
            return
        folder = self._find_folder(tuple(folders))
        try:
            yield folder, last
        finally:
            if folder is not None:
                os.close(folder)

    def _find_folder(self, names: tuple[str, ...]) -> int | None:
        """Open a folder below the root; ``None`` if it is missing, behind a link, or the package's own."""
        if self._is_own(names):
            return None
        current = os.open(".", DIRECTORY, dir_fd=self.fd)
        for name in names:
            try:
                below = os.open(name, DIRECTORY, dir_fd=current)
            except OSError as error:
                if error.errno not in NOT_THERE:
                    raise
                return None
            finally:
                os.close(current)
            current = below
        return current

    # -- files -----------------------------------------------------------------------------

    def sync(self, fd: int) -> None:
        """Make a file or folder durable, unless syncs are off; raise ``WriteFailed``."""
        if self.fsync:
            durable.sync(fd)

    def finish(self, fd: int) -> None:
        """Set the permissions and the times of a whole file, and make it durable."""
        os.fchmod(fd, self.mode)
        set_time_to_now(fd)
        self.sync(fd)

    def write(self, folder: int, name: str, chunks: Iterable[bytes], digest: Digest) -> None:
        """Write *chunks* under a temporary name, make them durable, and move them to *name*.

        Raises ``IntegrityError`` if they do not have *digest*, ``OSError``, ``WriteFailed``.
        """
        temporary = f".{digest.hex}.{secrets.token_hex(8)}.tmp"
        fd = os.open(temporary, ASIDE, 0o600, dir_fd=folder)
        try:
            hasher = hashlib.sha256()
            with open(fd, "wb") as stream:
                for chunk in chunks:
                    hasher.update(chunk)
                    stream.write(chunk)
                stream.flush()
                self.finish(stream.fileno())
            if hasher.hexdigest() != digest.hex:
                msg = f"the bytes of {digest} changed while they were published"
                raise IntegrityError(msg)
            self.move(folder, temporary, name)
        finally:
            durable.unlink(temporary, folder)

    @staticmethod
    def move(folder: int, temporary: str, name: str) -> None:
        """Move a finished file to *name* by a link, which fails if another publisher was first.

        A rename would replace the other's file, to which names may be linked already. Raises ``OSError``
        (``FileExistsError`` if there is a file).
        """
        try:
            os.link(temporary, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
        except OSError as error:
            if error.errno not in durable.NO_LINK:
                raise
            os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)

    def copy(self, source: int, temporary: str, folder: int) -> int:
        """Return a descriptor of a new file with the bytes of *source* and its time of modification."""
        return self._fill(source, temporary, folder, copy_bytes)

    def clone(self, source: int, temporary: str, folder: int) -> int | None:
        """Return a descriptor of a new file that shares the extents of *source*; ``None`` if it cannot."""
        try:
            return self._fill(source, temporary, folder, clone_bytes)
        except OSError as error:
            if error.errno not in NO_CLONE:
                raise
            durable.unlink(temporary, folder)
            return None

    def _fill(self, source: int, temporary: str, folder: int, how: Callable[[int, int], None]) -> int:
        with ExitStack() as undo:
            fd = os.open(temporary, ASIDE, 0o666, dir_fd=folder)
            undo.callback(os.close, fd)
            how(source, fd)
            info = os.fstat(source)
            os.utime(fd, ns=(info.st_atime_ns, info.st_mtime_ns))
            self.sync(fd)
            undo.pop_all()
        return fd

    def can_clone(self) -> bool:
        """Return whether a copy of a file needs no space here; tries it."""
        probe, copy = (f".{secrets.token_hex(16)}.tmp" for _ in range(2))
        with ExitStack() as undo:
            for name in (probe, copy):
                undo.callback(durable.unlink, name, self.fd)
            with open(os.open(probe, ASIDE, 0o600, dir_fd=self.fd), "wb") as stream:
                stream.write(b"?")
            source = os.open(probe, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
            undo.callback(os.close, source)
            fd = self.clone(source, copy, self.fd)
            if fd is not None:
                os.close(fd)
        return fd is not None

    # -- quarantine ------------------------------------------------------------------------

    def quarantine_path(self, digest: Digest, kind: str) -> Path:
        """Return a new path in quarantine; *kind* is its suffix."""
        return self.quarantine / f"{digest.hex}.{secrets.token_hex(4)}.{kind}"

    def keep_name(self, last: str, folder: int, digest: Digest) -> Path | None:
        """Link or copy the file *last* into quarantine; return where, ``None`` if it cannot be copied."""
        target = self.quarantine_path(digest, "name")
        try:
            os.link(last, target, src_dir_fd=folder, follow_symlinks=False)
        except OSError as error:
            if error.errno not in durable.NO_LINK:
                raise
            return target if keep_copy(last, folder, target) else None
        return target

    def is_quarantined(self, digest: Digest, info: os.stat_result) -> bool:
        """Return whether this file is linked into quarantine: it was the blob, and found to be bad."""
        if os.stat(self.quarantine).st_dev != info.st_dev:
            return False
        with os.scandir(self.quarantine) as found:
            named = (each for each in found if each.name.startswith(f"{digest.hex}."))
            return any(each.inode() == info.st_ino for each in named)


def is_plain(info: os.stat_result) -> bool:
    """Return whether *info* is of a regular file."""
    return stat.S_ISREG(info.st_mode)


def _components(root: Path, folder: Path) -> tuple[str, ...]:
    """Return the components of the path from *root* down to *folder*, none if it is elsewhere."""
    try:
        return folder.resolve().relative_to(root.resolve()).parts
    except ValueError:
        return ()
