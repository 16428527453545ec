"""Read every blob and every copy, and compare them with their digests.

Exit code 1 if one is damaged or missing, also if it was repaired.

Examples:
  scrapy streaming verify
  scrapy streaming verify --repair
"""

from __future__ import annotations

import dataclasses

from scrapy_streaming.cli.output import ExitCode, progress_of, write, write_json, write_row
from scrapy_streaming.cli.registry import Invocation, Verb, flag
from scrapy_streaming.cli.stores import opened
from scrapy_streaming.storage import maintenance


def verify(invocation: Invocation) -> int:
    """Print each damaged or missing file, and the totals."""
    with opened(invocation.settings) as store, progress_of("verify") as progress:
        result = maintenance.verify(store, repair=invocation.options.repair, progress=progress)
    if invocation.as_json:
        write_json(dataclasses.asdict(result) | {"damaged": result.damaged})
    else:
        for finding in result.findings:
            write_row(finding.kind, finding.digest, finding.detail, finding.repaired or None)
        write(
            f"verify: {result.blobs} blobs and {result.names} copies read ({result.bytes} bytes), "
            f"{result.good} blobs good, {result.damaged} files damaged or missing"
        )
    return ExitCode.WRONG if result.damaged else ExitCode.FINE


VERB = Verb(
    verify,
    (flag("--repair", "move damaged blobs to quarantine, and write wrong copies again from their blobs"),),
)
