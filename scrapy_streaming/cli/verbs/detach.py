"""Give every name bytes of its own, so that blobs and .streaming can be deleted.

Prints what to delete. Refused while a crawl runs, or if the copies do not fit on the
disk. Continues where an earlier run was interrupted. Exit code 1 if a name still needs
its blob; each is named with the reason.

Examples:
  scrapy streaming detach
"""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from scrapy_streaming.cli.output import ExitCode, progress_of, write, write_json
from scrapy_streaming.cli.registry import Invocation, Verb
from scrapy_streaming.cli.stores import ledger_paths, opened, refuse_while_used, refused_paths
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage import maintenance
from scrapy_streaming.storage.store import Storage


def detach(invocation: Invocation) -> int:
    """Give every name its own bytes, and print what can be deleted."""
    settings = invocation.settings
    refuse_while_used(settings)
    refused, refuse = refused_paths(as_json=invocation.as_json)
    with opened(settings) as store, progress_of("detach", "names") as progress:
        result = maintenance.detach(
            store,
            refused=refuse,
            spared=ledger_paths(settings),
            reserve=settings.min_free_bytes,
            progress=progress,
        )
        remove = [] if result.refused else _removable(settings, store)
    code = ExitCode.WRONG if result.refused else ExitCode.FINE
    if invocation.as_json:
        paths = [str(path) for path in remove]
        write_json(dataclasses.asdict(result) | {"refused": refused, "remove": paths})
        return code
    write(
        f"detach: {result.names} names: {result.detached} given bytes of their own, {result.made} made "
        f"again, {result.own} had them, {result.refused} refused; {result.bytes} bytes"
    )
    if remove:
        write(f"then, without the add-on in ADDONS: rm -r {shlex.join(str(path) for path in remove)}")
    return code


def _removable(settings: StreamingSettings, store: Storage) -> list[Path]:
    """Return what nothing needs any more: the blobs and this package's folder."""
    found = (*store.blobs.removable(), settings.directory)
    return [path for path in found if path is not None and path.exists()]


VERB = Verb(detach)
