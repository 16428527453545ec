"""The verbs that look and change nothing: ``failures``, ``check``, ``compare``.

Each takes the settings and its options, prints, and returns the exit code. For people by default,
separated by tabs when piped, one document with ``--json``.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from scrapy_streaming import console, metrics
from scrapy_streaming.exceptions import StoreError
from scrapy_streaming.protocol.jobs import JobState
from scrapy_streaming.reasons import explain
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage.ledger import FailedJob
from scrapy_streaming.storage.store import view_of
from scrapy_streaming.storage.view import StoreView

#: Hosts of a reason that are named on a screen.
HOSTS: Final = 3


def _for_people() -> bool:
    return sys.stdout.isatty()


def _print_columns(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table: in columns on a terminal, numbers to the right; by tabs and without headers if piped."""
    found = [tuple(row) for row in rows]
    if not _for_people():
        for row in found:
            console.line(*row)
        return
    lines = [tuple(headers), *found]
    widths = [max(len(line[at]) for line in lines) for at in range(len(headers))]
    for line in lines:
        cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        console.line("  ".join(cells).rstrip())


# -- failures -------------------------------------------------------------------------------


@dataclass(slots=True)
class Group:
    """The files that failed by one reason."""

    reason: str
    example: str
    states: Counter[str] = field(default_factory=Counter)
    hosts: Counter[str] = field(default_factory=Counter)

    @property
    def files(self) -> int:
        """How many there are."""
        return self.states.total()

    def named_hosts(self) -> str:
        """Return the hosts with most failures, and how many others there are."""
        if len(self.hosts) == 1:
            return next(iter(self.hosts))
        named = ", ".join(f"{host} ({number})" for host, number in self.hosts.most_common(HOSTS))
        more = len(self.hosts) - HOSTS
        return f"{named}, {more} more" if more > 0 else named


def grouped(failed: Iterable[FailedJob]) -> list[Group]:
    """Return the failures by reason, the most frequent first."""
    groups: dict[str, Group] = {}
    for job in failed:
        group = groups.setdefault(job.reason, Group(job.reason, job.url))
        group.states[job.state.value] += 1
        group.hosts[_host(job.url)] += 1
    return sorted(groups.values(), key=lambda group: (-group.files, group.reason))


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or "-"
    except ValueError:
        return "-"


def failures(settings: StreamingSettings, given: Namespace) -> int:
    """Print why files failed, with the remedy; with ``--urls`` the URLs alone."""
    with view_of(settings) as store:
        failed = (job for job in _failed(store) if given.reason in (None, job.reason))
        if given.urls:
            _print_urls(failed, as_json=given.json)
            return 0
        groups = grouped(failed)
    if given.json:
        console.out(json.dumps(_document(groups), indent=2))
    elif _for_people():
        _print_groups(groups)
    else:
        for group in groups:
            hosts = " ".join(f"{host}={number}" for host, number in group.hosts.most_common())
            remedy = explain(group.reason).remedy
            console.line(group.reason, group.files, hosts, group.example, remedy)
    return 0


def _failed(store: StoreView) -> Iterator[FailedJob]:
    after = 0
    while page := store.ledger.failed(after=after).result():
        after = page[-1].id
        yield from page


def _print_urls(failed: Iterable[FailedJob], *, as_json: bool) -> None:
    if as_json:
        console.out(json.dumps([job.url for job in failed], indent=2))
        return
    for job in failed:
        console.line(job.url)


def _document(groups: Iterable[Group]) -> dict[str, Any]:
    entries = [
        {
            "reason": group.reason,
            "files": group.files,
            "states": dict(group.states),
            "hosts": dict(group.hosts.most_common()),
            "example": group.example,
            **asdict(explain(group.reason)),
        }
        for group in groups
    ]
    return {"files": sum(group.files for group in groups), "failures": entries}


def _print_groups(groups: Sequence[Group]) -> None:
    states: Counter[str] = Counter()
    for group in groups:
        states += group.states
        why = explain(group.reason)
        console.line(f"{group.reason}: {_counted(group.files, 'file')}, {group.named_hosts()}")
        for name, text in (("why", why.meaning), ("to do", why.remedy), ("such as", group.example)):
            console.line(f"  {name:8}{text}")
    if not groups:
        console.out("failures: no file has failed")
        return
    dead = states[JobState.DEAD.value]
    console.out(f"failures: {_counted(states.total(), 'file')}; a crawl that names them tries again")
    if dead:
        console.out(f"but for {dead} that are dead: `scrapy streaming requeue --failed` brings them back")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


# -- check ----------------------------------------------------------------------------------

#: Exit codes: something may still come; what failed remains.
UNFINISHED: Final = 3
FAILED: Final = 4


def check(settings: StreamingSettings, given: Namespace) -> int:
    """Say how the jobs stand: 0 all done, 3 something may still come, else 4 for failed or dead ones.

    Raises ``StoreError`` (``not-found``) for a work id that no job has: whether all is done cannot be said.
    """
    with view_of(settings) as store:
        counts = store.ledger.job_counts(given.work_id).result()
    if given.work_id is not None and not sum(counts.values()):
        msg = f"no job has the work id {given.work_id}"
        raise StoreError(msg, reason="not-found")
    code, verdict = _verdict(counts)
    if given.json:
        jobs = {state.value: number for state, number in counts.items()}
        document = {"verdict": verdict, "exit_code": code, "work_id": given.work_id, "jobs": jobs}
        console.out(json.dumps(document, indent=2))
        return code
    _print_columns(("state", "jobs"), [(state.value, str(number)) for state, number in counts.items()])
    console.out(f"check: {verdict} (exit code {code})")
    return code


def _verdict(counts: dict[JobState, int]) -> tuple[int, str]:
    """Return the exit code and its words; as long as something may come, the rest is not over."""
    total = sum(counts.values())
    coming = counts[JobState.READY] + counts[JobState.LEASED]
    ended = counts[JobState.FAILED] + counts[JobState.DEAD]
    if coming:
        return UNFINISHED, f"{coming} of {total} jobs may still come"
    if ended:
        return FAILED, f"{ended} of {total} jobs failed or are dead: `scrapy streaming failures` says why"
    return 0, f"all {total} jobs are done"


# -- compare --------------------------------------------------------------------------------


def compare(_settings: StreamingSettings, given: Namespace) -> int:
    """Print what changed from one metrics file to another."""
    before, after = metrics.load(Path(given.before)), metrics.load(Path(given.after))
    changes = metrics.compare(before, after)
    if given.json:
        console.out(json.dumps({"changes": [asdict(change) for change in changes]}, indent=2))
        return 0
    if not changes:
        console.out("compare: nothing changed")
        return 0
    rows = [(c.name, _shown(c.before), _shown(c.after), _ratio(c.ratio)) for c in changes]
    _print_columns(("changed", "A", "B", "B/A"), rows)
    return 0


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


VERBS: Final[dict[str, Callable[[StreamingSettings, Namespace], int]]] = {
    "failures": failures,
    "check": check,
    "compare": compare,
}
