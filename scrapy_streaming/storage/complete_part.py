"""Complete parts: the value that ``parts`` produces and ``blobs`` publishes, and what its bytes prove.

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

    ``length`` in bytes. A part in memory has ``data``, one on disk has ``path``; the other is ``None``.
    ``coded`` is the digest of the bytes before they were decoded, ``None`` if they were not. ``stamp`` is
    that of the blob, once the part is published.
    """

    state: PartState
    length: int
    digest: Digest
    path: Path | None = None
    data: bytes | None = None
    coded: Digest | None = None
    stamp: bytes | None = None

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes, ``READ_SIZE`` at a time; raise ``OSError`` if the file cannot be read."""
        if self.path is None:
            yield self.data or b""
            return
        with open(self.path, "rb") as stream:
            yield from iter(lambda: stream.read(READ_SIZE), b"")


def small_part(state: PartState, data: bytes) -> CompletePart:
    """Return *data* as a complete part in memory."""
    state = dataclasses.replace(state, length=len(data), total=len(data))
    return CompletePart(state, len(data), Digest(hashlib.sha256(data).hexdigest()), data=data)


def promised_of(state: PartState) -> Digest | None:
    """Return the digest that the server sent, if the received bytes will be compared with it.

    ``None`` for a coded body: its digest may be that of the coded or of the decoded bytes, so it does not
    prove where the body ends.
    """
    return None if state.content_encoding else state.repr_digest


def broken_promise(part: CompletePart, expected: Digest | None) -> Digest | None:
    """Return the digest that the bytes of *part* should have and do not, ``None`` if they match.

    Compared are the caller's (*expected*) and the server's. The server's is of the coded bytes (RFC 9530
    §3), but many servers hash the file before they code it, so either may match. A coded body that was not
    decoded is not compared: the digest of its decoded bytes is not known.
    """
    if expected not in (None, part.digest):
        return expected
    sent = part.state.repr_digest
    both_known = not part.state.content_encoding or part.coded is not None
    return sent if both_known and sent not in (None, part.digest, part.coded) else None


def representation_of(part: CompletePart, expected: Digest | None) -> StoredRepresentation:
    """Return what the ledger records of a published representation.

    It has no validators if the body came in a coding: a server may send one tag for the coded and the plain
    form, and its 304 would then confirm the wrong one (RFC 9110 §8.8.1).
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
