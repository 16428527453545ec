"""The file system that a path is on: its type, its free space, whether its locks are reliable.

What may live here: questions to the system; nothing is written.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

#: File systems whose locks are not reliable enough for SQLite.
NETWORK_FILESYSTEMS: Final = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "9p", "ceph", "glusterfs", "lustre", "beegfs", "gpfs"}
    | {"fuse.sshfs", "fuse.glusterfs", "fuse.s3fs", "fuse.rclone", "fuse.gcsfuse", "fuse.davfs"}
)


def filesystem_of(path: Path, mountinfo: str | None = None) -> str | None:
    """Return the type of the file system *path* is on, ``None`` if it is not known.

    *mountinfo* is the text of ``/proc/self/mountinfo``, which is read without it.
    """
    if mountinfo is None:
        try:
            mountinfo = os.fsdecode(Path("/proc/self/mountinfo").read_bytes())
        except OSError:
            return None
    best, kind = -1, None
    resolved = path.resolve()
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        mount = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), left.split(" ")[4])
        if len(mount) >= best and resolved.is_relative_to(mount):  # the later of two in one place is visible
            best, kind = len(mount), right.split(" ")[0]
    return kind


def free_bytes(folder: Path) -> int:
    """Return how many bytes users may still write to the file system of *folder*; raise ``OSError``."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def locks_are_reliable(path: Path) -> bool:
    """Return whether a lock on a file at *path* excludes all other processes (storage rule 7)."""
    kind = filesystem_of(path)
    return kind is not None and kind not in NETWORK_FILESYSTEMS and not kind.startswith("fuse.")
