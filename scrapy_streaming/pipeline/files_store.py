"""Scrapy's store of files below ``FILES_STORE``, for hooks that write by themselves.

What may live here: subclasses of Scrapy's stores. Publishing by content is ``storage.blobs``.
"""

from __future__ import annotations

import os
import secrets
from io import BytesIO
from pathlib import Path
from typing import Any

from scrapy.pipelines.files import FSFilesStore


class AtomicFilesStore(FSFilesStore):
    """Writes whole files, through no link to a blob.

    ``written`` are the paths below the store that were written and not read back yet.
    """

    def __init__(self, basedir: Any) -> None:
        super().__init__(basedir)
        self.written: set[str] = set()

    def persist_file(self, path: Any, buf: BytesIO, info: Any, meta: Any = None, headers: Any = None) -> None:
        """Write a file aside and move it into place."""
        target = self._get_filesystem_path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{secrets.token_hex(16)}.tmp")
        temporary.write_bytes(buf.getvalue())
        temporary.replace(target)
        self.written.add(os.fspath(path))

    def take_written(self, path: Any) -> Path | None:
        """Return the file of a path that was written since it was last taken, else ``None``."""
        if os.fspath(path) not in self.written:
            return None
        self.written.discard(os.fspath(path))
        return self._get_filesystem_path(path)


def stock_schemes(store_schemes: dict[str, Any]) -> dict[str, Any]:
    """Return the kinds of stores as ``FilesPipeline`` has them, with those that a subclass added."""
    return {
        scheme: FSFilesStore if kind is AtomicFilesStore else kind for scheme, kind in store_schemes.items()
    }
