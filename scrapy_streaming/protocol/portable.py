"""Export and import: a completion as a line of JSON, and the files that a feed of Scrapy lists.

What may live here: values and their texts. Files are read and written elsewhere.
"""

from __future__ import annotations

import ast
import csv
import enum
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

from scrapy_streaming.protocol.fields import EntityTag
from scrapy_streaming.protocol.jobs import Completion, StoredRepresentation
from scrapy_streaming.protocol.validators import Validators

#: The ``format`` of each line of an export; another number is another format.
FORMAT: Final = "scrapy-streaming/1"
#: Characters of one item of a feed, at most; a longer text is no item.
LONGEST: Final = 16 << 20
#: Characters between the items of a list, and at its end.
_BETWEEN: Final = " \t\r\n,[]"
_DECODER: Final = json.JSONDecoder()

_HEX: Final = {32: re.compile("[0-9a-f]{32}"), 64: re.compile("[0-9a-f]{64}")}
_DIGEST: Final = re.compile("sha256:[0-9a-f]{64}")


class Unreadable(ValueError):
    """A line, or an entry of one, cannot be used; ``reason`` is the word for why.

    ``unreadable``, ``newer-format``, ``no-url``, ``no-path``.
    """

    def __init__(self, message: str, reason: str = "unreadable") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Record:
    """One completion with its job's request, as it is exported from a ledger and imported into another.

    ``represents``: the completion is its URL's stored representation, as of ``fetched_at`` (seconds since the
    epoch). ``resumed_from`` in bytes.
    """

    work_id: str
    artifact_id: str
    url: str
    request_hash: str
    completion: Completion
    resumed_from: int = 0
    represents: bool = True
    fetched_at: float = 0.0


class Entered(enum.StrEnum):
    """What became of a record at its import."""

    IMPORTED = "imported"
    KNOWN = "known"  # the ledger has this one, or a newer one
    HELD = "job-held"
    CONFLICT = "key-conflict"
    BLOB_GOING = "blob-going"
    BLOB_SIZE = "length-mismatch"


def to_document(record: Record) -> dict[str, Any]:
    """Return the record as the JSON object of a line of an export."""
    done, known = record.completion, record.completion.known
    tag = known.validators.etag
    return {
        "format": FORMAT,
        "work_id": record.work_id,
        "artifact_id": record.artifact_id,
        "url": record.url,
        "request_hash": record.request_hash,
        "completion_id": done.completion_id,
        "generation": done.generation,
        "completed_at": done.completed_at,
        "path": done.path,
        "by_response": done.by_response,
        "digest": known.digest,
        "size": known.size,
        "resumed_from": record.resumed_from,
        "final_url": known.final_url,
        "etag": None if tag is None else str(tag),
        "last_modified": known.validators.last_modified,
        "date": known.validators.date,
        "media_type": known.media_type,
        "vary": list(known.vary),
        "selecting": known.selecting,
        "proof": known.proof,
        "fetched_at": record.fetched_at if record.represents else None,
    }


def record_of(document: Mapping[str, Any]) -> Record:
    """Return the record of a line of an export; raise ``Unreadable`` if it has none."""
    if document.get("format") != FORMAT:
        msg = f"the format is {document.get('format')!r}, this version reads {FORMAT}"
        raise Unreadable(msg, "newer-format")
    fields = _Fields(document)
    tag = fields.text_or_none("etag")
    etag = None if tag is None else EntityTag.parse(tag)
    if tag is not None and etag is None:
        raise _wrong("etag", tag)
    digest = fields.text("digest")
    if _DIGEST.fullmatch(digest) is None:
        raise _wrong("digest", digest)
    vary = document.get("vary")
    if not isinstance(vary, list) or not all(isinstance(name, str) for name in vary):
        raise _wrong("vary", vary)
    by_response = document.get("by_response")
    if not isinstance(by_response, bool):
        raise _wrong("by_response", by_response)
    completed_at = fields.time("completed_at")
    represents = document.get("fetched_at") is not None
    known = StoredRepresentation(
        digest=digest,
        size=fields.number("size"),
        validators=Validators(etag, fields.text_or_none("last_modified"), fields.text_or_none("date")),
        final_url=fields.text("final_url"),
        media_type=fields.text_or_none("media_type"),
        vary=tuple(vary),
        selecting=fields.text("selecting"),
        fetched_at=completed_at,
        proof=fields.text("proof"),
    )
    done = Completion(
        fields.hexadecimal("completion_id", 32),
        known,
        completed_at,
        generation=fields.number("generation", 1),
        path=fields.text_or_none("path"),
        by_response=by_response,
    )
    return Record(
        fields.text("work_id"),
        fields.text("artifact_id"),
        fields.text("url"),
        fields.hexadecimal("request_hash", 64),
        done,
        fields.number("resumed_from"),
        represents,
        fields.time("fetched_at") if represents else 0.0,
    )


class _Fields:
    """Reads the fields of a document, each by its type; raises ``Unreadable`` for one of another type."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document

    def text(self, name: str) -> str:
        value = self._document.get(name)
        if not isinstance(value, str):
            raise _wrong(name, value)
        return value

    def text_or_none(self, name: str) -> str | None:
        return None if self._document.get(name) is None else self.text(name)

    def number(self, name: str, least: int = 0) -> int:
        value = self._document.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 63:
            raise _wrong(name, value)
        return value

    def time(self, name: str) -> float:
        value = self._document.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e11:
            raise _wrong(name, value)
        return float(value)

    def hexadecimal(self, name: str, digits: int) -> str:
        value = self.text(name)
        if _HEX[digits].fullmatch(value) is None:
            raise _wrong(name, value)
        return value


def _wrong(name: str, value: object) -> Unreadable:
    return Unreadable(f"{name} is {str(value)[:80]!r}")


# -- feeds ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FeedFile:
    """One file in a feed: the entry that ``FilesPipeline`` put into its item.

    ``checksum`` in hexadecimal: MD5, or SHA-256; ``None`` if the entry has none.
    """

    url: str
    path: str
    checksum: str | None


def files_of_item(item: Mapping[str, Any], field: str) -> list[FeedFile | Unreadable]:
    """Return the files of an item's *field*, and an ``Unreadable`` for each entry that cannot be used."""
    value = item.get(field)
    if isinstance(value, str):  # a cell of CSV
        try:
            value = _of_cell(value)
        except Unreadable as error:
            return [error]
    if not value:
        return []
    if not isinstance(value, list):
        return [Unreadable(f"{field} is no list of files")]
    return [_file_of(entry) for entry in value]


def _of_cell(text: str) -> Any:
    """Return the value of a cell of CSV: Scrapy writes a list of dictionaries as a Python literal."""
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError) as error:
        msg = "the cell holds no list of files"
        raise Unreadable(msg) from error


def _file_of(entry: object) -> FeedFile | Unreadable:
    if not isinstance(entry, Mapping):
        return Unreadable("an entry is no dictionary")
    url, path, checksum = (entry.get(name) for name in ("url", "path", "checksum"))
    if not isinstance(url, str) or not url:
        return Unreadable("an entry has no url", "no-url")
    if not isinstance(path, str) or not path:
        return Unreadable(f"{url} has no path", "no-path")
    if checksum in (None, ""):
        return FeedFile(url, path, None)
    text = str(checksum).lower()
    if len(text) not in _HEX or _HEX[len(text)].fullmatch(text) is None:
        return Unreadable(f"{url} has the checksum {text[:80]!r}, neither MD5 nor SHA-256")
    return FeedFile(url, path, text)


def documents(lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any] | Unreadable]]:
    """Yield each document of a feed with the number of the line where it begins (1 is the first).

    JSON Lines, JSON (a list, indented or not) or CSV with a header, distinguished by the first character.
    For a document that cannot be read the error is yielded; the next document begins with the next line that
    can begin one.
    """
    rest = iter(enumerate(lines, 1))
    for number, text in rest:
        start = text.lstrip("\ufeff \t\r\n")
        if start:
            every = chain([(number, start)], rest)
            yield from _json_documents(every) if start[0] in "[{" else _csv_documents(every)
            return


def _json_documents(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, dict[str, Any] | Unreadable]]:
    kept, began = "", 0
    for number, text in lines:
        if kept and (text.startswith("{") or len(kept) > LONGEST):
            yield began, Unreadable("it does not end")
            kept = ""
        if not kept:
            began, kept = number, text
        else:
            kept += text
            if not text.startswith(("}", "]")):  # within an indented item
                continue
        found, kept = _decoded(kept)
        for each in found:
            yield began, each
            began = number
    if kept:
        yield began, Unreadable("it does not end")


def _decoded(text: str) -> tuple[list[dict[str, Any] | Unreadable], str]:
    """Return the items in *text*, and the rest, which may be the beginning of another."""
    found: list[dict[str, Any] | Unreadable] = []
    while (text := text.lstrip(_BETWEEN)).startswith("{"):
        try:
            document, end = _DECODER.raw_decode(text)
        except RecursionError:
            return [*found, Unreadable("it is nested too deeply")], ""
        except ValueError:
            return found, text
        found.append(document)
        text = text[end:]
    return ([*found, Unreadable("it is no item")], "") if text else (found, "")


def _csv_documents(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, dict[str, Any] | Unreadable]]:
    at = 0

    def texts() -> Iterator[str]:
        nonlocal at
        for number, text in lines:
            at = number
            yield text

    limit = csv.field_size_limit(LONGEST)
    try:
        rows, began = csv.DictReader(texts()), 0
        while True:
            began = at + 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield at, Unreadable(str(error))
                continue
            yield max(began, 2), {name: value for name, value in row.items() if isinstance(name, str)}
    finally:
        csv.field_size_limit(limit)
