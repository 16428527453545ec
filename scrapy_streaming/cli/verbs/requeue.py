"""Make failed and dead jobs ready again.

Names jobs by their keys, of which the first six hex digits are enough, or takes all.
Exit code 1 if a key is no job's, or its job is neither failed nor dead.

Examples:
  scrapy streaming requeue --failed
  scrapy streaming requeue f8946140d22c 4cbdc7b43168
"""

from __future__ import annotations

import re
from typing import Final

from scrapy_streaming.cli.output import ExitCode, warn, write, write_json
from scrapy_streaming.cli.registry import Invocation, Verb, WrongCall, flag, option
from scrapy_streaming.cli.stores import opened
from scrapy_streaming.protocol.jobs import JobState
from scrapy_streaming.storage.ledger import Ledger

#: Hex digits of a key that must be given at least.
PREFIX: Final = 6


def requeue(invocation: Invocation) -> int:
    """Make jobs ready, and print how many; name each key that is refused."""
    options = invocation.options
    _check_keys(options.keys, all_failed=options.failed)
    refused: list[str] = []
    with opened(invocation.settings) as store:
        if options.failed:
            number = store.ledger.requeue_all().result()
        else:
            found = [_requeueable(store.ledger, key.lower(), refused) for key in options.keys]
            keys = [key for key in found if key is not None]
            number = store.ledger.requeue(*keys).result() if keys else 0
    if invocation.as_json:
        write_json({"requeued": number, "refused": refused})
    else:
        write(f"requeue: {number} jobs are ready again")
    for line in refused:
        warn(f"requeue: {line}")
    return ExitCode.WRONG if refused else ExitCode.FINE


def _check_keys(keys: list[str], *, all_failed: bool) -> None:
    if bool(keys) == all_failed:
        msg = "requeue takes the KEYs of jobs, or --failed for all that failed or are dead"
        raise WrongCall(msg)
    for key in keys:
        if re.fullmatch(f"[0-9a-fA-F]{{{PREFIX},64}}", key) is None:
            msg = f"{key!r} is no key: {PREFIX} to 64 hex digits (scrapy streaming ls shows them)"
            raise WrongCall(msg)


def _requeueable(ledger: Ledger, prefix: str, refused: list[str]) -> str | None:
    """Return the whole key; else ``None``, with the cause appended to *refused*."""
    keys = ledger.keys(prefix).result()
    if len(keys) != 1:
        why = "begins more than one key (ambiguous)" if keys else "is no job's key (not-found)"
        refused.append(f"{prefix} {why}")
        return None
    state = ledger.states_of(keys).result()[keys[0]]
    if state not in (JobState.FAILED, JobState.DEAD):
        refused.append(f"{prefix} is {state}, neither failed nor dead (not-ended)")
        return None
    return keys[0]


VERB = Verb(
    requeue,
    (
        option("keys", nargs="*", metavar="KEY", help="the key of a job"),
        flag("--failed", "all jobs that failed or are dead"),
    ),
)
