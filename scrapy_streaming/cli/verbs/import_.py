"""Record what an export, or a feed of FilesPipeline, says of files that are in the store.

Fetches nothing, and changes nothing newer. A FILE of - is read from standard input.
Exit code 1 if a line could not be imported; each is named by its number and the reason.

Examples:
  scrapy streaming import downloads.jsonl
  scrapy streaming import items.json --work-id documents
"""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from w3lib.url import canonicalize_url

from scrapy_streaming.cli.output import ExitCode, progress_of, warn, write, write_json, write_row
from scrapy_streaming.cli.registry import Invocation, Verb, WrongCall, option
from scrapy_streaming.cli.stores import STANDARD_STREAM, opened_for_files
from scrapy_streaming.protocol.portable import FeedFile, Unreadable, documents, files_of_item, record_of
from scrapy_streaming.redaction import clean, url_without_userinfo
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage import maintenance


def import_file(invocation: Invocation) -> int:
    """Import an export or a feed; print each line that is refused, and the totals."""
    file, field = invocation.options.file, invocation.options.field or invocation.result_field
    refused: list[dict[str, object]] = []

    def refuse(number: int, what: str, reason: str) -> None:
        if invocation.as_json:
            refused.append({"line": number, "what": what, "reason": reason})
        else:
            write_row(number, reason, what)

    with (
        _read(file) as stream,
        opened_for_files(invocation.settings) as store,
        progress_of("import", "files") as progress,
    ):
        lines = _Lines(stream)
        wanted = _wanted(documents(lines), field, invocation.settings, invocation.options.work_id)
        result = maintenance.carry(store, wanted, refused=refuse, progress=progress)
    if invocation.as_json:
        write_json(dataclasses.asdict(result) | {"refused": refused})
    else:
        why = "".join(f", {number} {reason}" for reason, number in sorted(result.reasons.items()))
        write(
            f"import: {result.files} files, {result.bytes} bytes: {result.imported} imported, "
            f"{result.known} were known, {result.refused} refused{why}"
        )
    if not (lines.are_empty or result.files or result.refused):
        text = f"import: no line names a stored file in the field {field!r} (--field names another)"
        warn(clean(f"{text} (no-files)"))
        return ExitCode.WRONG
    return ExitCode.WRONG if result.refused else ExitCode.FINE


class _Lines:
    """The lines of a stream; ``are_empty`` until one has a character."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.are_empty = True

    def __iter__(self) -> Iterator[str]:
        for text in self._stream:
            self.are_empty = self.are_empty and not text.strip()
            yield text


@contextmanager
def _read(file: str) -> Iterator[TextIO]:
    """Give the lines of a file; bytes that are no text refuse their line, not the file."""
    if file == STANDARD_STREAM:
        yield io.TextIOWrapper(sys.stdin.buffer, "utf-8", "surrogateescape")
        return
    with Path(file).open(encoding="utf-8", errors="surrogateescape") as stream:
        yield stream


def _wanted(
    found: Iterable[tuple[int, dict[str, Any] | Unreadable]],
    field: str,
    settings: StreamingSettings,
    work_id: str | None,
) -> Iterator[tuple[int, maintenance.Wanted]]:
    """Give what the documents of an export or a feed ask for, each with the number of its line."""
    for number, document in found:
        if isinstance(document, Unreadable):
            yield number, document
        elif "format" in document and "completion_id" in document:
            try:
                yield number, record_of(document)
            except Unreadable as error:
                yield number, error
        else:
            for file in files_of_item(document, field):
                yield number, _of_feed(file, document, settings, work_id)


def _of_feed(
    file: FeedFile | Unreadable, item: dict[str, Any], settings: StreamingSettings, given: str | None
) -> maintenance.Wanted:
    """Return a feed's file with its work id, which must be that of later crawls."""
    if isinstance(file, Unreadable):
        return file
    of_item = "" if settings.work_id_field is None else str(item.get(settings.work_id_field) or "")
    work_id = given or of_item or settings.work_id
    if not work_id:
        msg = (
            "the feed does not say which spider its files belong to: give --work-id SPIDER, the name of the "
            "spider that will request them (or set STREAMING_WORK_ID, if the crawls have it set)"
        )
        raise WrongCall(msg)
    try:
        return replace(file, url=canonicalize_url(url_without_userinfo(file.url))), work_id
    except ValueError:
        return Unreadable(f"{file.url} is no URL", "no-url")


VERB = Verb(
    import_file,
    (
        option(
            "file",
            metavar="FILE.jsonl|FEED",
            help="an export, or a feed in JSON, JSON Lines or CSV; - for standard input",
        ),
        option("--work-id", metavar="SPIDER", help="the spider that will request the files of a feed"),
        option("--field", metavar="NAME", help="the field of a feed's items that has the results of files"),
    ),
)
