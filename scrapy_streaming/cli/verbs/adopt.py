"""Adopt the files that FilesPipeline stored.

Hashes each file once and records it as a blob, ahead of the crawl. Continues where an
earlier run was interrupted. Exit code 1 if a file could not be adopted; each is named
with the reason.

Examples:
  scrapy streaming -s FILES_STORE=downloads adopt
"""

from __future__ import annotations

import dataclasses

from scrapy_streaming.cli.output import ExitCode, progress_of, write, write_json
from scrapy_streaming.cli.registry import Invocation, Verb
from scrapy_streaming.cli.stores import ledger_paths, opened_for_files, refused_paths
from scrapy_streaming.storage import maintenance


def adopt(invocation: Invocation) -> int:
    """Adopt files, and print the totals."""
    settings = invocation.settings
    refused, refuse = refused_paths(as_json=invocation.as_json)
    with opened_for_files(settings) as store, progress_of("adopt", "files") as progress:
        result = maintenance.adopt(store, refused=refuse, spared=ledger_paths(settings), progress=progress)
    if invocation.as_json:
        write_json(dataclasses.asdict(result) | {"refused": refused})
    else:
        write(
            f"adopt: {result.files} files, {result.bytes} bytes: {result.adopted} adopted, "
            f"{result.known} were known, {result.refused} refused"
        )
    return ExitCode.WRONG if result.refused else ExitCode.FINE


VERB = Verb(adopt)
