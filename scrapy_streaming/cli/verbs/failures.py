"""Show why files failed, and what to do.

Grouped by reason, the most frequent first: how many files, at which hosts, what the
reason means, the remedy, an example.

Examples:
  scrapy streaming failures
  scrapy streaming failures --urls --reason bad-status-403 > refused.txt
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from scrapy_streaming.cli.output import ExitCode, counted, is_for_people, write, write_json, write_row
from scrapy_streaming.cli.registry import Invocation, Verb, flag, option
from scrapy_streaming.explanations import explain
from scrapy_streaming.protocol.jobs import JobState
from scrapy_streaming.reporting.failures import FailureGroup, document_of, grouped
from scrapy_streaming.storage.ledger import FailedJob
from scrapy_streaming.storage.store import view_of
from scrapy_streaming.storage.view import StoreView


def show_failures(invocation: Invocation) -> int:
    """Print the failures by reason; with ``--urls`` the URLs alone."""
    reason = invocation.options.reason
    with view_of(invocation.settings) as store:
        failed = (job for job in _failed(store) if reason in (None, job.reason))
        if invocation.options.urls:
            _write_urls(failed, as_json=invocation.as_json)
            return ExitCode.FINE
        groups = grouped(failed)
    if invocation.as_json:
        write_json(document_of(groups))
    elif is_for_people():
        _write_groups(groups)
    else:
        for group in groups:
            hosts = " ".join(f"{host}={number}" for host, number in group.hosts.most_common())
            write_row(group.reason, group.files, hosts, group.example, explain(group.reason).remedy)
    return ExitCode.FINE


def _failed(store: StoreView) -> Iterator[FailedJob]:
    after = 0
    while page := store.ledger.failed(after=after).result():
        after = page[-1].id
        yield from page


def _write_urls(failed: Iterable[FailedJob], *, as_json: bool) -> None:
    if as_json:
        write_json([job.url for job in failed])
        return
    for job in failed:
        write_row(job.url)


def _write_groups(groups: Sequence[FailureGroup]) -> None:
    states: Counter[str] = Counter()
    for group in groups:
        states += group.states
        why = explain(group.reason)
        write_row(f"{group.reason}: {counted(group.files, 'file')}, {group.named_hosts()}")
        for name, text in (("why", why.meaning), ("to do", why.remedy), ("such as", group.example)):
            write_row(f"  {name:8}{text}")
    if not groups:
        write("failures: no file has failed")
        return
    dead = states[JobState.DEAD.value]
    write(f"failures: {counted(states.total(), 'file')}; a crawl that requests them tries again")
    if dead:
        write(f"except {dead} that are dead: `scrapy streaming requeue --failed` makes them ready again")


VERB = Verb(
    show_failures,
    (
        flag("--urls", "print the URLs alone, one a line"),
        option("--reason", metavar="WORD", help="only files that failed for this reason"),
    ),
)
