"""The arguments of callers: each is checked, or refused by a ``TypeError`` that names it.

What may live here: checks that more than one function of ``integration`` needs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urldefrag

from scrapy_streaming.integration.receiving import Progress
from scrapy_streaming.protocol.digests import Digest, expected_digest
from scrapy_streaming.protocol.validators import Validators

#: The fields of ``validators`` and ``part_state``, in the order of ``Validators.from_fields``.
_FIELDS: Final = ("etag", "last_modified", "date")


def checked_path(name: str, value: Any) -> Path:
    """Return a path, or raise ``TypeError`` naming the argument."""
    if isinstance(value, str | os.PathLike) and (text := os.fspath(value)) and isinstance(text, str):
        return Path(text).absolute()
    msg = f"{name} must be a path, got {value!r}"
    raise TypeError(msg)


def checked_digest(value: Any, url: str = "") -> Digest | None:
    """Return the expected digest (``sha256:…``, 64 hex digits, ``{"sha256": …}``), or raise ``TypeError``."""
    fragment = urldefrag(url)[1]
    try:
        match value:
            case None:
                return expected_digest(None, None, fragment)
            case Digest():
                return expected_digest(str(value), None, fragment)
            case str():
                text = value if ":" in value else f"sha256:{value}"
                return expected_digest(text, None, fragment)
            case Mapping():
                return expected_digest(None, {"sha256": value["sha256"]}, fragment)
    except (ValueError, KeyError, AttributeError) as error:
        msg = f"expected={value!r} is no SHA-256: {error}"
        raise TypeError(msg) from error
    msg = f"expected must be 'sha256:<64 hex digits>', got {type(value).__name__}"
    raise TypeError(msg)


def checked_name(value: Any) -> str | None:
    """Return the path of a file below the store, or raise ``TypeError``."""
    if value is None or isinstance(value, str):
        return value
    msg = f"name must be a path below the store, got {type(value).__name__}"
    raise TypeError(msg)


def checked_callback(value: Any) -> Progress | None:
    """Return the callback, or raise ``TypeError``."""
    if value is None or callable(value):
        checked: Progress | None = value
        return checked
    msg = f"progress_callback must be callable with (bytes, total or None), got {type(value).__name__}"
    raise TypeError(msg)


def checked_number(name: str, value: Any, least: int) -> int:
    """Return a number of bytes, or raise ``TypeError`` naming the argument."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= least:
        return value
    msg = f"{name} must be a whole number of bytes, {least} or more, got {value!r}"
    raise TypeError(msg)


def checked_validators(name: str, given: Any) -> Validators | None:
    """Return validators, made of a mapping if need be, or raise ``TypeError``; ``None`` for ``None``."""
    if given is None or isinstance(given, Validators):
        return given
    if not hasattr(given, "items"):
        msg = f"{name} must be Validators or a mapping of fields, got {type(given).__name__}"
        raise TypeError(msg)
    found = {_text(key).lower().replace("-", "_"): value for key, value in given.items()}
    values = {field: found.get(field) for field in _FIELDS}
    for field, value in values.items():
        if value is not None and not isinstance(value, str | bytes | list | tuple):
            msg = f"{name}[{field!r}] must be a text as the server sent it, got {type(value).__name__}"
            raise TypeError(msg)
    return Validators.from_fields(*([] if values[f] is None else _all(values[f]) for f in _FIELDS))


def _all(value: Any) -> list[str]:
    return [_text(each).strip() for each in (value if isinstance(value, list | tuple) else [value])]


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)
