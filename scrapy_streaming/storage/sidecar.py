"""Sidecars: the small file beside each part that says what its bytes are and how many are durable.

What may live here: the names of a part's files, and the sidecar's text. Nothing here opens a file.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final

from scrapy_streaming.protocol import codings
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.protocol.reasons import Proof
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.redaction import url_without_userinfo

FORMAT: Final = 1
#: Bytes of a sidecar that are read at most: no sound one comes near.
SIDECAR_LIMIT: Final = 1 << 20
_NUMBER = r"(0|[1-9][0-9]{0,17})"
_NAME = re.compile(rf"([0-9a-f]{{64}})\.{_NUMBER}-{_NUMBER}\.(part|json|json\.tmp)", re.ASCII)


@dataclass(frozen=True, slots=True, order=True)
class PartName:
    """The name of a part: its job, the ``fence`` of the claim that owns it, and its number in that claim."""

    key: str
    fence: int
    serial: int

    @classmethod
    def parse(cls, name: str) -> PartName | None:
        """Return the name, or ``None`` if no part has such a name (E12)."""
        match = _NAME.fullmatch(name)
        return None if match is None else cls(match[1], int(match[2]), int(match[3]))

    @property
    def part(self) -> str:
        """The file with the bytes."""
        return f"{self.key}.{self.fence}-{self.serial}.part"

    @property
    def sidecar(self) -> str:
        """The file that says how many of them are durable, and what they hash to."""
        return f"{self.key}.{self.fence}-{self.serial}.json"

    @property
    def temporary(self) -> str:
        """The sidecar's file while it is written."""
        return f"{self.sidecar}.tmp"


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A part found on disk, as its sidecar describes it; nothing of it is verified yet.

    ``written_at`` is when the sidecar was written, in seconds since the epoch by the filesystem's clock.
    """

    name: PartName
    state: PartState
    written_at: float = 0.0


# -- what a sidecar says ---------------------------------------------------------------------


def encode(name: PartName, state: PartState) -> bytes:
    """Return the sidecar's bytes: JSON, in UTF-8."""
    validators = state.validators
    document = {
        "format": FORMAT,
        "job_key": name.key,
        "fence": name.fence,
        "url": url_without_userinfo(state.url),
        "etag": None if validators.etag is None else str(validators.etag),
        "last_modified": validators.last_modified,
        "date": validators.date,
        "length": state.length,
        "prefix_sha256": state.prefix_sha256,
        "total": state.total,
        "content_encoding": state.content_encoding,
        "vary": state.vary,
        "selecting": state.selecting,
        "repr_digest": None if state.repr_digest is None else str(state.repr_digest),
        "ranges_refused": state.ranges_refused,
        "media_type": state.media_type,
        "coding_is_content": state.coding_is_content,
        "proof": state.proof,
    }
    return json.dumps(document, sort_keys=True).encode()


def decode(name: PartName, text: bytes) -> PartState | None:
    """Return what a sidecar says, or ``None`` if it is damaged, newer, or another part's (R4)."""
    try:
        document = json.loads(text)
        if [document["format"], document["job_key"], document["fence"]] != [FORMAT, name.key, name.fence]:
            return None
        digest = _typed(document["repr_digest"], str, None)
        state = PartState(
            url=_typed(document["url"], str),
            validators=_decode_validators(document),
            length=_typed(document["length"], int),
            prefix_sha256=Digest(document["prefix_sha256"]).hex,
            total=_typed(document["total"], int, None),
            content_encoding=_typed(document["content_encoding"], str),
            vary=tuple(_typed(field, str) for field in _typed(document["vary"], list)),
            selecting=_typed(document["selecting"], str),
            repr_digest=None if digest is None else Digest.parse(digest),
            ranges_refused=_typed(document["ranges_refused"], bool),
            media_type=_typed(document["media_type"], str, None),
            coding_is_content=_typed(_coding_is_content(document), bool),
            proof=Proof(document.get("proof", Proof.LENGTH)),
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    sound = state.length >= 0 and (state.total is None or state.total >= state.length)
    return state if sound else None


def _coding_is_content(document: dict[str, Any]) -> Any:
    """Return whether the file is meant to be in its coding; older releases did not note it (R34)."""
    if "coding_is_content" in document:
        return document["coding_is_content"]
    return codings.is_content(document["content_encoding"], document["media_type"], [document["url"]])


def _decode_validators(document: dict[str, Any]) -> Validators:
    """Return the validators; raise ``ValueError`` for what no response can have given (E6)."""
    said = [_typed(document[field], str, None) for field in ("etag", "last_modified", "date")]
    found = Validators.from_fields(*([] if value is None else [value] for value in said))
    if [None if found.etag is None else str(found.etag), found.last_modified, found.date] != said:
        raise ValueError
    return found


def _typed(value: Any, kind: type, *others: None) -> Any:
    """Return *value* if it is exactly a *kind* (a ``bool`` is no ``int``), or one of *others*."""
    if type(value) is not kind and value not in others:
        raise TypeError
    return value
