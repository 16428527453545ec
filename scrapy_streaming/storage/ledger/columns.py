"""Column types: the value in Python, and the bytes or text stored for it.

What may live here: conversions of one value.
"""

from __future__ import annotations

import re
from typing import Any, Final
from urllib.parse import quote_from_bytes, unquote_to_bytes

from sqlalchemy import Dialect, LargeBinary, Text, TypeDecorator

_DIGEST_PREFIX: Final = "sha256:"
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


class Unreadable(ValueError):
    """A column has a value of a wrong type: the row was damaged on the disk."""


def _hexadecimal(value: Any) -> str:
    """Return stored bytes as hexadecimal text; raise ``Unreadable`` for anything but bytes."""
    if isinstance(value, bytes | memoryview):
        return value.hex()
    msg = f"{type(value).__name__} in the place of bytes"
    raise Unreadable(msg)


class Hex(TypeDecorator[str]):
    """Hexadecimal text, stored as the bytes it stands for."""

    impl = LargeBinary
    cache_ok = True

    def process_bind_param(self, value: str | None, _dialect: Dialect) -> bytes | None:
        """Return the bytes; raise ``ValueError`` for what is not hexadecimal."""
        return None if value is None else bytes.fromhex(value)

    def process_result_value(self, value: Any, _dialect: Dialect) -> str | None:
        """Return the text."""
        return None if value is None else _hexadecimal(value)


class Words(TypeDecorator[str]):
    """Text from servers and users, which may contain NUL: PostgreSQL has no such character."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, _dialect: Dialect) -> str | None:
        """Return the text with U+FFFD for NUL."""
        return None if value is None else value.replace("\0", "\ufffd")


class PathText(TypeDecorator[str]):
    """A path below the store's root, which may contain any bytes, unlike text in a database.

    A path that is not UTF-8 (with the lone surrogates of ``os.fsdecode``) is stored percent-encoded after a
    slash, with which no such path begins.
    """

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, _dialect: Dialect) -> str | None:
        """Return the stored text; raise ``UnicodeEncodeError`` for what cannot be a file's name."""
        if value is None or _SURROGATE.search(value) is None:
            return value
        return "/" + quote_from_bytes(value.encode("utf-8", "surrogateescape"))

    def process_result_value(self, value: str | None, _dialect: Dialect) -> str | None:
        """Return the path."""
        if value is None or not value.startswith("/"):
            return value
        return unquote_to_bytes(value[1:]).decode("utf-8", "surrogateescape")


class DigestText(TypeDecorator[str]):
    """``sha256:<hex>``, stored as 32 bytes."""

    impl = LargeBinary
    cache_ok = True

    def process_bind_param(self, value: str | None, _dialect: Dialect) -> bytes | None:
        """Return the bytes."""
        return None if value is None else bytes.fromhex(value.removeprefix(_DIGEST_PREFIX))

    def process_result_value(self, value: Any, _dialect: Dialect) -> str | None:
        """Return the text."""
        return None if value is None else _DIGEST_PREFIX + _hexadecimal(value)
