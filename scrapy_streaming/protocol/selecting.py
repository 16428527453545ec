"""Which request fields select a representation, and whether two requests select the same one.

What may live here: names of request fields, and the key that stands for their values. RFC 9110
§12.5.5 is behind it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from scrapy_streaming.protocol.jobs import StoredRepresentation

#: Request fields that a plan may set. A request that has one of its own is not planned.
PLAN_FIELDS: Final = (
    "Range",
    "If-Range",
    "If-None-Match",
    "If-Modified-Since",
    "If-Match",
    "If-Unmodified-Since",
)

#: Fields that every planned request has. Offsets count octets of the encoded representation
#: (RFC 9110 §14.1.2), so no coding is accepted; a digest of the whole is asked for (RFC 9530 §4).
ALWAYS: Final[Mapping[str, str]] = MappingProxyType(
    {"Accept-Encoding": "identity", "Want-Repr-Digest": "sha-256=10"}
)

#: Selecting fields whose value is not known when a request is planned.
_UNKNOWABLE: Final = frozenset({"*", "cookie"})

#: Selecting fields that every planned request sets or clears, with the value they get: a request before
#: planning and the same request when it is sent have one key (nginx: ``Vary: Accept-Encoding``).
_PLANNED: Final[Mapping[str, str]] = MappingProxyType(
    {name.lower(): value for name, value in ALWAYS.items()} | {name.lower(): "" for name in PLAN_FIELDS}
)


def selecting_key(vary: Sequence[str], fields: Mapping[str, str]) -> str:
    """Return 64 hex digits that stand for the values of the fields *vary* names (R4, E7).

    Authorization counts whether Vary names it or not: a part is never shared between
    credentials (R73). Only the hash is stored, so credentials do not reach the disk.
    """
    names = sorted({*vary, "authorization"})
    chosen = [[name, _PLANNED.get(name, fields.get(name, ""))] for name in names]
    return hashlib.sha256(json.dumps(chosen, separators=(",", ":")).encode()).hexdigest()


def selected_again(vary: tuple[str, ...], selecting: str, fields: Mapping[str, str]) -> bool:
    """Whether a request with *fields* is sure to select the same representation (RFC 9110 §12.5.5).

    *vary* and *selecting* are those of what is stored, *fields* by lower-case name.
    """
    return not _UNKNOWABLE.intersection(vary) and selecting == selecting_key(vary, fields)


def selects_again(known: StoredRepresentation, fields: Mapping[str, str]) -> bool:
    """Whether *known* answers a request with *fields* (by lower-case name), without asking a server (R40).

    Any request may be answered where Vary names only fields that every planned request sets itself.
    """
    if _PLANNED.keys() >= set(known.vary):
        return True
    return selected_again(known.vary, known.selecting, fields)
