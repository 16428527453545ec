"""A complete part as a value: what parts give and blobs take, and what its bytes prove.

What may live here: that value, and comparisons of its digest.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import StoredRepresentation
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.protocol.reasons import Proof
from scrapy_streaming.protocol.validators import Validators

#: Bytes read in one piece when a file is hashed or copied.
READ_SIZE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class CompletePart:
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


def small_part(state: PartState, data: bytes) -> CompletePart:
    """Return *data* as a complete part that was never on disk."""
    state = dataclasses.replace(state, length=len(data), total=len(data))
    return CompletePart(state, len(data), Digest(hashlib.sha256(data).hexdigest()), data=data)


def promised_of(state: PartState) -> Digest | None:
    """Return the digest that the server gave, if the received bytes will be compared with it.

    For a coded body it may be that of the octets or of the content, so it does not show where the body ends.
    """
    return None if state.content_encoding else state.repr_digest


def broken_promise(part: CompletePart, expected: Digest | None) -> Digest | None:
    """Return the digest that the bytes of *part* should have and do not: the caller's, or the server's.

    A digest of a coded body is of its octets (RFC 9530 §3); many servers hash the file and code it
    afterwards. One of the two must match; where nothing was decoded, the other is unknown.
    """
    if expected not in (None, part.digest):
        return expected
    said = part.state.repr_digest
    both_known = not part.state.content_encoding or part.coded is not None
    return said if both_known and said not in (None, part.digest, part.coded) else None


def representation_of(part: CompletePart, expected: Digest | None) -> StoredRepresentation:
    """Return what the ledger records of a representation that was published.

    Bytes that came in a coding have no validators: a server may give one tag to both forms, and its
    304 would confirm the wrong one (RFC 9110 §8.8.1).
    """
    state = part.state
    compared = expected is not None or (state.repr_digest is not None and not state.content_encoding)
    return StoredRepresentation(
        digest=str(part.digest),
        size=part.length,
        validators=Validators() if state.content_encoding else state.validators,
        final_url=state.url,
        media_type=state.media_type,
        vary=state.vary,
        selecting=state.selecting,
        proof=Proof.DIGEST if compared else state.proof,
    )
