"""Sidecars: the JSON file beside each part that describes its bytes and says how many are durable.

What may live here: the names of a part's files, and the sidecar's format. Nothing here opens a file.
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
#: Bytes of a sidecar that are read at most; a sound one is far smaller.
SIDECAR_LIMIT: Final = 1 << 20
_NUMBER = r"(0|[1-9][0-9]{0,17})"
_NAME = re.compile(rf"([0-9a-f]{{64}})\.{_NUMBER}-{_NUMBER}\.(part|json|json\.tmp)", re.ASCII)


@dataclass(frozen=True, slots=True, order=True)
class PartName:
    """The name of a part: its job's key, its claim's ``fence``, and its number within that claim."""

    key: str
    fence: int
    serial: int

    @classmethod
    def parse(cls, name: str) -> PartName | None:
        """Return the part whose file is called *name*, ``None`` if no part's file is (E12)."""
        match = _NAME.fullmatch(name)
        return None if match is None else cls(match[1], int(match[2]), int(match[3]))

    @property
    def part(self) -> str:
        """The file with the bytes."""
        return f"{self.key}.{self.fence}-{self.serial}.part"

    @property
    def sidecar(self) -> str:
        """The file that describes the bytes."""
        return f"{self.key}.{self.fence}-{self.serial}.json"

    @property
    def temporary(self) -> str:
        """The sidecar while it is written."""
        return f"{self.sidecar}.tmp"


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A part found on disk, as its sidecar describes it; its bytes are not verified.

    ``written_at`` is when the sidecar was written, in seconds since the epoch by the file system's clock.
    """

    name: PartName
    state: PartState
    written_at: float = 0.0


# -- the format ------------------------------------------------------------------------------


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
    """Return the content of a sidecar, ``None`` if it is damaged, of another format or part (R4)."""
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
    """Return whether the file itself is meant to be coded, which older releases did not record (R34)."""
    if "coding_is_content" in document:
        return document["coding_is_content"]
    return codings.is_content(document["content_encoding"], document["media_type"], [document["url"]])


def _decode_validators(document: dict[str, Any]) -> Validators:
    """Return the validators; raise ``ValueError`` for values that no response can have had (E6)."""
    fields = [_typed(document[field], str, None) for field in ("etag", "last_modified", "date")]
    found = Validators.from_fields(*([] if value is None else [value] for value in fields))
    if [None if found.etag is None else str(found.etag), found.last_modified, found.date] != fields:
        raise ValueError
    return found


def _typed(value: Any, kind: type, *others: None) -> Any:
    """Return *value* if its type is exactly *kind* (a ``bool`` is not an ``int``), or it is one of *others*.

    Raises ``TypeError`` for any other value.
    """
    if type(value) is not kind and value not in others:
        raise TypeError
    return value
