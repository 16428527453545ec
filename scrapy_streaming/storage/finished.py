"""A finished part as a value: what parts give and blobs take."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.resume import PartState

#: Bytes read in one piece when a file is hashed or copied.
READ_SIZE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class FinishedPart:
    """A whole representation, not yet published: bytes on disk, or in memory when small.

    ``length`` in bytes. ``path`` is ``None`` for one that never needed a file of its own;
    ``data`` is ``None`` for one on disk. ``coded`` is the digest of the octets as they came, if a
    coding was taken off them. ``stamp`` is that of the blob once it is published.
    """

    state: PartState
    length: int
    digest: Digest
    path: Path | None = None
    data: bytes | None = None
    coded: Digest | None = None
    stamp: bytes | None = None

    def chunks(self) -> Iterator[bytes]:
        """Give the bytes, ``READ_SIZE`` at a time; raises ``OSError`` if the file cannot be read."""
        if self.path is None:
            yield self.data or b""
            return
        with open(self.path, "rb") as stream:
            yield from iter(lambda: stream.read(READ_SIZE), b"")


def small_part(state: PartState, data: bytes) -> FinishedPart:
    """Return *data* as a finished part that was never on disk."""
    state = dataclasses.replace(state, length=len(data), total=len(data))
    return FinishedPart(state, len(data), Digest(hashlib.sha256(data).hexdigest()), data=data)
