"""Pattern 3, idempotency: what a file leads to (a mail, a row, a message) is done once.

python idempotency.py before|after URL FOLDER
"""

import sys
import urllib.request
from pathlib import Path

from scrapy_streaming.integration import (
    acquire_or_reuse_job,
    complete_job,
    generate_job_key,
    generate_operation_key,
    get_streaming_database,
    run_effect,
    try_streaming_finalization,
    try_streaming_io,
    try_streaming_resume_decision,
)


def before(url: str, folder: Path) -> str:
    """Fetch and tell: run again after a crash, it fetches again and tells again."""
    path, _ = urllib.request.urlretrieve(url, folder / "report.bin")
    return tell(folder, Path(path).stat().st_size)


def after(url: str, folder: Path) -> str:
    """Fetch under a job, and tell as an effect of it: both are recorded, each once."""
    key = generate_job_key("reports", "", url)
    with get_streaming_database(f"sqlite:///{folder / 'ledger.sqlite3'}") as db:
        job = acquire_or_reuse_job(db, key, "reporter")
        if job is None:  # SCRAPY_STREAMING_IDEMPOTENCY_ENABLED=0, or no SQLAlchemy: as it was
            return before(url, folder)
        operation = generate_operation_key("TELL", key, to="readers")
        if hasattr(job, "completion_id"):  # done in an earlier run: nothing is fetched or told
            return f"told before ({job.known.digest})"
        artifact = fetch(url, folder)
        told = run_effect(
            db,
            operation,
            lambda: tell(folder, artifact.size),
            lease=job,
            recover=lambda: was_told(folder),  # it died between telling and recording: look first
        )
        complete_job(db, job, artifact, url=url)
        return told


def fetch(url: str, folder: Path):
    part = folder / "report.part"
    decision = try_streaming_resume_decision(None, part, url=url)
    if decision.mode != "cached" or decision.headers:
        request = urllib.request.Request(url, headers=decision.headers)
        try_streaming_io(urllib.request.urlopen(request), part, progress_callback=show)
    return try_streaming_finalization(part, store=folder / "store", name="report.bin")


def tell(folder: Path, size: int) -> str:
    with (folder / "outbox.txt").open("a") as outbox:  # stands for the mail, the row, the message
        outbox.write(f"a report of {size} bytes\n")
    return f"told of {size} bytes"


def was_told(folder: Path) -> str | None:
    outbox = folder / "outbox.txt"
    return f"told: {outbox.read_text().strip()}" if outbox.exists() else None


def show(had: int, total: int | None) -> None:
    print(had, flush=True)


if __name__ == "__main__":
    how, url, folder = sys.argv[1:]
    print("stored", (before if how == "before" else after)(url, Path(folder)))
