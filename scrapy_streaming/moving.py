"""The verbs of ``scrapy streaming`` for arriving and leaving: what they do, and what they print.

As in ``console``: each takes the settings and its options, prints, and returns the exit code. Raises what
the store and the ledger raise.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import secrets
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TextIO

from w3lib.url import canonicalize_url

from scrapy_streaming.console import WrongCall, line, out, progress_of, refuse_beside_others
from scrapy_streaming.exceptions import StoreError
from scrapy_streaming.protocol.portable import (
    FeedFile,
    Unreadable,
    documents,
    files_of_item,
    record_of,
    to_document,
)
from scrapy_streaming.redaction import clean, url_without_userinfo, write_lines
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage import maintenance
from scrapy_streaming.storage.ledger.sqlite import files_of
from scrapy_streaming.storage.locations import ledger_file
from scrapy_streaming.storage.store import Storage, Use, view_of
from scrapy_streaming.storage.view import StoreView

#: The file that stands for what is typed in, or printed.
STREAM: Final = "-"
#: Jobs that are asked of the ledger at once.
PAGE: Final = 1000


# -- adopt ----------------------------------------------------------------------------------


def adopt(settings: StreamingSettings, given: Namespace) -> int:
    """Take over the files that another program stored; 1 if some could not be, each named."""
    refused: list[dict[str, str]] = []

    def say(path: str, reason: str) -> None:
        if given.json:
            refused.append({"path": path, "reason": reason})
        else:
            line(reason, path)

    with _made(settings) as store, progress_of("adopt", "files") as progress:
        result = maintenance.adopt(store, refused=say, spared=_spared(settings), progress=progress)
    if given.json:
        out(json.dumps(dataclasses.asdict(result) | {"refused": refused}, indent=2))
    else:
        out(
            f"adopt: {result.files} files, {result.bytes} bytes: {result.adopted} taken over, "
            f"{result.known} were known, {result.refused} refused"
        )
    return int(result.refused > 0)


# -- export and import ----------------------------------------------------------------------


def export(settings: StreamingSettings, given: Namespace) -> int:
    """Write a line for the last completion of each job whose bytes are there."""
    with (
        view_of(settings) as store,
        progress_of("export", "lines") as progress,
        _written(given.file) as stream,
    ):
        lines, size = _export(store, stream, progress)
    if given.json and given.file != STREAM:
        out(json.dumps({"lines": lines, "bytes": size, "file": given.file}, indent=2))
        return 0
    said = f"export: {lines} lines, of files of {size} bytes"
    write_lines(sys.stderr, said) if given.file == STREAM else out(f"{said}, in {given.file}")
    return 0


def _export(store: StoreView, stream: TextIO, progress: maintenance.Progress | None) -> tuple[int, int]:
    lines = size = after = 0
    while page := store.ledger.records(after, PAGE).result():
        after = page[-1][0]
        for _, record in page:
            stream.write(json.dumps(to_document(record)) + "\n")
            lines, size = lines + 1, size + record.completion.known.size
        if progress is not None:
            progress(lines, size)
    return lines, size


@contextmanager
def _written(file: str) -> Iterator[TextIO]:
    """Give what an export is written to: a file that is there only when it is whole, or what is printed."""
    if file == STREAM:
        yield sys.stdout
        return
    target = Path(file)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("x", encoding="ascii") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def import_(settings: StreamingSettings, given: Namespace) -> int:
    """Record what an export or a feed says of files that are here; 1 if a line could not be, each named."""
    refused: list[dict[str, object]] = []

    def say(number: int, what: str, reason: str) -> None:
        if given.json:
            refused.append({"line": number, "what": what, "reason": reason})
        else:
            line(number, reason, what)

    empty = True

    def lines(stream: TextIO) -> Iterator[str]:
        nonlocal empty
        for text in stream:
            empty = empty and not text.strip()
            yield text

    with _read(given.file) as stream, _made(settings) as store, progress_of("import", "files") as progress:
        wanted = _wanted(documents(lines(stream)), settings, given)
        result = maintenance.carry(store, wanted, told=say, progress=progress)
    if given.json:
        out(json.dumps(dataclasses.asdict(result) | {"refused": refused}, indent=2))
    else:
        why = "".join(f", {number} {reason}" for reason, number in sorted(result.reasons.items()))
        out(
            f"import: {result.files} files, {result.bytes} bytes: {result.imported} imported, "
            f"{result.known} were known, {result.refused} refused{why}"
        )
    if not (empty or result.files or result.refused):
        field = given.field or given.result_field
        text = f"import: nothing in it names a stored file in the field {field!r} (--field names another)"
        write_lines(sys.stderr, clean(f"{text} (no-files)"))
        return 1
    return int(result.refused > 0)


@contextmanager
def _read(file: str) -> Iterator[TextIO]:
    """Give the lines of a feed; of bytes that are no text the line is named, not the feed refused."""
    if file == STREAM:
        yield io.TextIOWrapper(sys.stdin.buffer, "utf-8", "surrogateescape")
        return
    with Path(file).open(encoding="utf-8", errors="surrogateescape") as stream:
        yield stream


def _wanted(
    found: Iterable[tuple[int, dict[str, Any] | Unreadable]], settings: StreamingSettings, given: Namespace
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
            for file in files_of_item(document, given.field or given.result_field):
                yield number, _of_feed(file, document, settings, given)


def _of_feed(
    file: FeedFile | Unreadable, item: dict[str, Any], settings: StreamingSettings, given: Namespace
) -> maintenance.Wanted:
    """Return a file with its job: the work id is what the crawl will have, so it is asked for."""
    if isinstance(file, Unreadable):
        return file
    of_item = "" if settings.work_id_field is None else str(item.get(settings.work_id_field) or "")
    work_id = given.work_id or of_item or settings.work_id
    if not work_id:
        msg = (
            "whose files are these? Give --work-id SPIDER, the name of the spider that will ask for them "
            "(or set STREAMING_WORK_ID, if the crawls have it set)"
        )
        raise WrongCall(msg)
    try:
        return replace(file, url=canonicalize_url(url_without_userinfo(file.url))), work_id
    except ValueError:
        return Unreadable(f"{file.url} is no URL", "no-url")


# -- detach ---------------------------------------------------------------------------------


def detach(settings: StreamingSettings, given: Namespace) -> int:
    """Give every name bytes of its own, and say what to delete then; 1 if some still need their blob."""
    refuse_beside_others(settings)
    refused: list[dict[str, str]] = []

    def say(path: str, reason: str) -> None:
        if given.json:
            refused.append({"path": path, "reason": reason})
        else:
            line(reason, path)

    with closing(Storage.open(settings, Use.MAINTAIN)) as store, progress_of("detach", "names") as progress:
        result = maintenance.detach(
            store, refused=say, spared=_spared(settings), reserve=settings.min_free_bytes, progress=progress
        )
        remove = [] if result.refused else _removable(settings, store)
    if given.json:
        numbers = dataclasses.asdict(result) | {"refused": refused, "remove": [str(path) for path in remove]}
        out(json.dumps(numbers, indent=2))
        return int(result.refused > 0)
    out(
        f"detach: {result.names} names: {result.detached} given bytes of their own, {result.made} made "
        f"again, {result.own} had them, {result.refused} refused; {result.bytes} bytes"
    )
    if remove:
        out(f"then, without the add-on in ADDONS: rm -r {shlex.join(str(path) for path in remove)}")
    return int(result.refused > 0)


def _removable(settings: StreamingSettings, store: Storage) -> list[Path]:
    """Return what nothing needs any more: the blobs and this package's folder."""
    found = (*store.blobs.removable(), settings.directory)
    return [path for path in found if path is not None and path.exists()]


def _made(settings: StreamingSettings) -> closing[Storage]:
    """Return the store, made in a folder that is none yet; raise ``StoreError`` without a folder."""
    if settings.store is not None and not settings.store.is_dir():
        msg = f"FILES_STORE={str(settings.store)!r} is no folder: there is nothing to take over"
        raise StoreError(msg, reason="store-missing")
    if not settings.finalization_enabled:
        msg = "STREAMING_FINALIZATION_ENABLED is off: files are taken over as blobs, and there are none"
        raise StoreError(msg, reason="finalization-off")
    return closing(Storage.open(settings))


def _spared(settings: StreamingSettings) -> tuple[Path, ...]:
    """Return the ledger's files: they may stand among the store's."""
    path = None if settings.directory is None else ledger_file(settings, settings.directory)
    return () if path is None else tuple(Path(each) for each in files_of(path))


VERBS: Final[dict[str, Callable[[StreamingSettings, Namespace], int]]] = {
    "adopt": adopt,
    "export": export,
    "import": import_,
    "detach": detach,
}
