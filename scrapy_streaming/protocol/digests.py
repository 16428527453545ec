"""Digests: the names of blobs, and the digest that a caller or a URL expects.

What may live here: SHA-256 as a value, and its texts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

_HEX = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Digest:
    """A SHA-256 digest. ``hex`` is 64 lower-case digits; ``str()`` gives ``sha256:<hex>``."""

    SIZE: ClassVar[int] = 32

    hex: str

    def __post_init__(self) -> None:
        if _HEX.fullmatch(self.hex) is None:
            msg = f"not 64 lower-case hex digits: {self.hex!r}"
            raise ValueError(msg)

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Return the digest that ``sha256:<hex>`` names; raise ``ValueError`` otherwise."""
        algorithm, _, digits = text.partition(":")
        if algorithm.lower() != "sha256":
            msg = f"expected sha256:<64 hex digits>, got {text!r}"
            raise ValueError(msg)
        return cls(digits.lower())

    def __str__(self) -> str:
        return f"sha256:{self.hex}"


def expected_digest(given: str | None, checksums: Mapping[str, str] | None, fragment: str) -> Digest | None:
    """Return the digest that the caller expects, ``None`` if there is none.

    *given* is ``meta["streaming"]["digest"]``, *checksums* is ``meta["expected_checksum"]``,
    *fragment* the URL's (``sha256=<hex>``). Raises ``ValueError`` when one cannot be read or
    two of them disagree: a wrong expectation must not count as none.
    """
    found: set[Digest] = set()
    if given is not None:
        found.add(Digest.parse(given))
    if checksums is not None and "sha256" in checksums:
        found.add(Digest(checksums["sha256"].lower()))
    name, _, value = fragment.partition("=")
    if name.lower() == "sha256":
        found.add(Digest(value.lower()))
    if len(found) > 1:
        msg = f"expected digests disagree: {', '.join(sorted(map(str, found)))}"
        raise ValueError(msg)
    return found.pop() if found else None
