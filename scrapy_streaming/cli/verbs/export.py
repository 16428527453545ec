"""Write what the ledger records, one line a completion.

It has the last completion of each job whose bytes are in the store. FILE may be -, for
standard output.

Examples:
  scrapy streaming export downloads.jsonl
  scrapy streaming export - | wc -l
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TextIO

from scrapy_streaming.cli.output import ExitCode, Progress, progress_of, warn, write, write_json
from scrapy_streaming.cli.registry import Invocation, Verb, option
from scrapy_streaming.cli.stores import STANDARD_STREAM
from scrapy_streaming.protocol.portable import to_document
from scrapy_streaming.storage.durable import whole_file
from scrapy_streaming.storage.store import view_of
from scrapy_streaming.storage.view import StoreView

#: Jobs read from the ledger at a time.
PAGE: Final = 1000


def export(invocation: Invocation) -> int:
    """Write the export, and print its totals; to standard error if the export itself is printed."""
    file = invocation.options.file
    with (
        view_of(invocation.settings) as store,
        progress_of("export", "lines") as progress,
        _written(file) as stream,
    ):
        lines, size = _export(store, stream, progress)
    totals = f"export: {lines} lines, of files of {size} bytes"
    if file == STANDARD_STREAM:
        warn(totals)
    elif invocation.as_json:
        write_json({"lines": lines, "bytes": size, "file": file})
    else:
        write(f"{totals}, in {file}")
    return ExitCode.FINE


def _export(store: StoreView, stream: TextIO, progress: Progress | None) -> tuple[int, int]:
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
    """Give a stream for the export: the file appears only once it is whole."""
    if file == STANDARD_STREAM:
        yield sys.stdout
        return
    with whole_file(Path(file), fsync=True, mode=0o666) as stream:
        yield stream


VERB = Verb(export, (option("file", metavar="FILE.jsonl", help="the file to write; - for standard output"),))
