"""Blob stores: complete parts stored by their digest, and the names that people use for them.

What may live here: the choice of the store by the settings. A new kind of store is a module that implements
``base.BlobStore``, and a line in ``STORES``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage.blobs.base import (
    Adopted,
    BlobStore,
    FoundBlob,
    Hashed,
    Inspection,
    Named,
    Presence,
    Published,
    Survey,
    Tampered,
    blob_key,
)
from scrapy_streaming.storage.blobs.local import LocalBlobStore
from scrapy_streaming.storage.blobs.named import NamesOnlyStore

__all__ = [
    "Adopted",
    "BlobStore",
    "FoundBlob",
    "Hashed",
    "Inspection",
    "Named",
    "Presence",
    "Published",
    "Survey",
    "Tampered",
    "blob_key",
    "open_blobs",
]

#: The kinds of store in order of precedence: the first that serves the settings is opened.
STORES: Final[tuple[type[BlobStore], ...]] = (
    NamesOnlyStore,
    LocalBlobStore,
)


def open_blobs(settings: StreamingSettings, root: Path, quarantine: Path) -> BlobStore:
    """Return the store that *settings* ask for; raise ``OSError`` if *root* cannot be opened."""
    kind = next(kind for kind in STORES if kind.serves(settings))
    return kind.from_settings(settings, root, quarantine)
