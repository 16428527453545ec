"""Names as text: the path below the store's root that a name means, or why it is not usable.

What may live here: decisions about text, and the errors about names. Nothing here touches a file.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from scrapy_streaming.exceptions import StoreError
from scrapy_streaming.storage import durable

#: Errors of a file system for a name that it does not support.
NO_NAME: Final = frozenset({errno.ENAMETOOLONG, errno.EILSEQ})
#: The package's own folders in ``blobs``; users may have files beside them.
OWN_BLOBS: Final = (("blobs", "sha256"), ("blobs", ".trash"))


def safe_parts(wanted: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return the components of a path below the store's root, as Scrapy's own store does (C8, E1, F19).

    For Scrapy ``/a//b/../c`` is ``a/c`` in the store. Raises ``StoreError`` (``store-unsafe``) for a path
    that leaves the store, contains NUL, is empty, has a component above 255 bytes, or is one of the
    package's own: ``.streaming``, ``blobs/sha256``, ``blobs/.trash``, and ``blobs`` itself.
    """
    text = os.fspath(wanted)
    parts: list[str] = []
    for part in text.split("/"):
        if part == "..":
            if not parts:
                raise unusable(wanted)
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    found = tuple(parts)
    own = found[:1] == (".streaming",) or found == ("blobs",) or found[:2] in OWN_BLOBS
    if not found or "\0" in text or own or any(_is_too_long(part) for part in found):
        raise unusable(wanted)
    return found


def _is_too_long(part: str) -> bool:
    try:
        return len(os.fsencode(part)) > 255
    except UnicodeEncodeError:  # no file can have such a name
        return True


def unusable(wanted: str | os.PathLike[str]) -> StoreError:
    """Return the error for a path that cannot be a name (``store-unsafe``)."""
    msg = f"file_path() gave {wanted!r}, which is no usable path inside FILES_STORE"
    return StoreError(msg, reason="store-unsafe")


@contextmanager
def naming(wanted: str) -> Iterator[None]:
    """Turn an ``OSError`` inside into ``WriteFailed``, or ``StoreError`` for a name that cannot exist."""
    with durable.writing(f"cannot make the name {wanted!r}"):
        try:
            yield
        except OSError as error:
            if error.errno not in NO_NAME and not isinstance(error, IsADirectoryError):
                raise
            raise unusable(wanted) from error
