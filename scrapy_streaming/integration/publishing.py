"""The third step: publish a whole part by its content, and under a name.

What may live here: ``try_streaming_finalization``, and what ``download`` shares with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from hashlib import file_digest
from pathlib import Path
from typing import Any

from scrapy_streaming.exceptions import BodyIncomplete, IntegrityError, WriteFailed
from scrapy_streaming.integration.arguments import checked_digest, checked_name, checked_path
from scrapy_streaming.integration.switches import is_off, or_fall_back, settings, why_no_streaming
from scrapy_streaming.integration.values import FinalizedArtifact
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.storage.blobs import blob_key
from scrapy_streaming.storage.complete_part import CompletePart, broken_promise
from scrapy_streaming.storage.decoding import coded_twice
from scrapy_streaming.storage.part_files import KEY, PartFile
from scrapy_streaming.storage.store import Storage


def try_streaming_finalization(
    part_path: str | os.PathLike[str],
    *,
    store: str | os.PathLike[str],
    expected: Any = None,
    name: str | None = None,
    fallback: bool = False,
) -> FinalizedArtifact | None:
    """Publish a whole part; ``None`` if ``STREAMING_FINALIZATION_ENABLED`` is off.

    The bytes become a blob in *store* (a folder, as ``FILES_STORE``), durably and atomically, with the name
    *name* (a path below *store*) if it is given; then the part is removed. A content coding that was not
    requested is removed. *expected* is the digest that the bytes must have: ``sha256:<hex>``, hex, or
    ``{"sha256": hex}``. A file without a sidecar counts as whole. Raises ``TypeError`` for a wrong argument,
    ``BodyIncomplete`` for a part that is not whole, ``PartCorrupt``, ``IntegrityError`` (the part stays),
    ``Undecodable``, ``DecodedTooLarge``, ``StoreError``, ``WriteFailed``.
    """
    path, root = checked_path("part_path", part_path), checked_path("store", store)
    wanted, named = checked_digest(expected), checked_name(name)
    if is_off(why_no_streaming("finalization")):
        return None
    return or_fall_back(fallback, lambda: _finalize(path, root, wanted, named))


def _finalize(path: Path, root: Path, expected: Digest | None, name: str | None) -> FinalizedArtifact:
    # opened without the ledger: nothing is recorded, and store.json notes that the ledger is behind
    with closing(Storage.open(replace(settings(root), schema_enabled=False))) as files:
        if name is not None:
            files.blobs.check_name(name)  # raises before anything is written
        part = PartFile(path, fsync=files.fsync)
        try:
            finished = _whole_part(part)
            finished = decoded(
                finished, expected, lambda coded: part.decode(coded, KEY, 0, settings().max_size)
            )
            wrong = broken_promise(finished, expected)
            if wrong is not None:
                msg = f"{path}: the bytes hash to {finished.digest}, expected was {wrong}"
                raise IntegrityError(msg)
            published = files.blobs.publish(finished)
            target = blob_key(finished.digest)
            if name is not None:
                target = files.blobs.name(finished.digest, name, stamp=published.stamp, part=finished).path
            part.remove_files()
        finally:
            part.close()
    return FinalizedArtifact(root / target, str(finished.digest), finished.length, published.deduplicated)


def _whole_part(part: PartFile) -> CompletePart:
    stored = part.current()
    if stored is None:
        return _without_sidecar(part.path)
    if not stored.state.whole:
        state = stored.state
        of = "an unknown number" if state.total is None else state.total
        msg = f"{part.path} has {state.length} bytes of {of}; finish the download first"
        raise BodyIncomplete(msg, state.length)
    return replace(part.complete_part(stored), path=part.path)


def _without_sidecar(path: Path) -> CompletePart:
    """Return a file that the caller wrote by other means; hash it."""
    try:
        with path.open("rb") as stream:
            digest = Digest(file_digest(stream, "sha256").hexdigest())
            length = os.fstat(stream.fileno()).st_size
    except OSError as error:
        msg = f"{path} cannot be published: {error.strerror}"
        raise WriteFailed(msg, reason="part-missing") from error
    state = PartState("", Validators(), length, digest.hex, length)
    return CompletePart(state, length, digest, path)


def decoded(
    part: CompletePart, expected: Digest | None, decode: Callable[[CompletePart], CompletePart]
) -> CompletePart:
    """Return the part without content codings that were not requested; *decode* removes them (R34).

    A part whose encoded bytes are the expected ones stays as it is.
    """
    state = part.state
    if not state.content_encoding or expected == part.digest:
        return part
    if state.coding_is_content and coded_twice(part.chunks(), state.content_encoding):
        part = replace(part, state=replace(state, coding_is_content=False))
    return decode(part) if part.state.to_decode else part
