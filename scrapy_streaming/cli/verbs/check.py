"""Say whether all jobs are done, by the exit code.

0: all are done. 3: a crawl that requests them can still finish some. 4: all have ended,
and some failed or are dead. 1: unknown, as for a work id that no job has.

Examples:
  scrapy streaming check
  scrapy streaming check --work-id documents --json
"""

from __future__ import annotations

from scrapy_streaming.cli.output import ExitCode, write, write_json, write_table
from scrapy_streaming.cli.registry import Invocation, Verb, option
from scrapy_streaming.exceptions import StoreError
from scrapy_streaming.reporting.completeness import Completeness, completeness_of
from scrapy_streaming.storage.store import view_of

_EXIT_CODES = {
    Completeness.DONE: ExitCode.FINE,
    Completeness.UNFINISHED: ExitCode.UNFINISHED,
    Completeness.FAILED: ExitCode.FAILED,
}


def check(invocation: Invocation) -> int:
    """Print the number of jobs in each state, and a verdict.

    Raises ``StoreError`` (``not-found``) for a work id that no job has.
    """
    work_id = invocation.options.work_id
    with view_of(invocation.settings) as store:
        counts = store.ledger.job_counts(work_id).result()
    if work_id is not None and not sum(counts.values()):
        msg = f"no job has the work id {work_id}"
        raise StoreError(msg, reason="not-found")
    completeness, verdict = completeness_of(counts)
    code = _EXIT_CODES[completeness]
    if invocation.as_json:
        jobs = {state.value: number for state, number in counts.items()}
        write_json({"verdict": verdict, "exit_code": code, "work_id": work_id, "jobs": jobs})
        return code
    write_table(("state", "jobs"), [(state.value, str(number)) for state, number in counts.items()])
    write(f"check: {verdict} (exit code {code})")
    return code


VERB = Verb(check, (option("--work-id", metavar="W", help="only jobs of this work id"),))
