"""Real stores in this process, filled by real publishes, with jobs that were really done.

What may live here: opening a store by settings, claiming, publishing and completing in it, and what it
leaves on disk and open.
"""

from __future__ import annotations

import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from scrapy_streaming.exceptions import BlobGoing
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import Granted, Lease, StoredRepresentation, job_key
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage.complete_part import small_part
from scrapy_streaming.storage.ledger import JobRequest
from scrapy_streaming.storage.sidecar import PartName
from scrapy_streaming.storage.store import Storage, Use
from support.crawl import sha256 as sha

TRIES = 1000


class Source(dict[str, Any]):
    """Settings as a project gives them."""

    def getpriority(self, name: str) -> int | None:
        return 20 if name in self else None


def settings_for(store: Path | str, **values: Any) -> StreamingSettings:
    return StreamingSettings.load(Source(FILES_STORE=str(store), **values), {})


def open_store(root: Path, url: str | None = None, use: Use = Use.CRAWL, **values: Any) -> Storage:
    given = {"STREAMING_FSYNC": False, "STREAMING_LINK_MODE": "copy", "STREAMING_DATABASE_URL": url} | values
    return Storage.open(settings_for(root, **given), use)


def open_files() -> list[str]:
    """Return the paths below ``/`` that this process has open: sockets and pipes are the test runner's."""
    names = []
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            names.append(str(fd.readlink()))
    return sorted(name for name in names if name.startswith("/") and not name.startswith(("/proc", "/dev/n")))


def url_of(number: int) -> str:
    return f"https://example.org/{number}"


def key_of(number: int) -> str:
    return job_key("work", "", url_of(number))


def claim(store: Storage, number: int, **how: Any) -> Granted:
    request = JobRequest("work", "", url_of(number), sha(b"GET"))
    granted = store.ledger.claim(key_of(number), request, **how).result()
    assert isinstance(granted, Granted), granted
    return granted


def publish(store: Storage, data: bytes) -> Digest:
    return store.blobs.publish(small_part(PartState(url_of(0), Validators()), data)).digest


def complete(store: Storage, lease: Lease, number: int, data: bytes) -> None:
    stamp = store.blobs.inspect_blob(
        Digest(sha(data)), len(data), None
    ).stamp  # None for a blob that gc just takes
    known = StoredRepresentation(f"sha256:{sha(data)}", len(data), Validators(), url_of(number), stamp=stamp)
    store.ledger.complete(lease, known, path=f"full/{number}").result()


def fetch(store: Storage, number: int, data: bytes) -> Digest:
    """Do what a crawl does for one job; ``data`` is what the server gives."""
    lease = claim(store, number, refresh_before=math.inf).lease
    for _ in range(TRIES):
        digest = publish(store, data)
        store.blobs.name(digest, f"full/{number}")
        try:
            complete(store, lease, number, data)
        except BlobGoing:
            time.sleep(0.005)
        else:
            return digest
    msg = "the blob was going for ever"
    raise AssertionError(msg)


def part_of(store: Storage, number: int, fence: int = 1, data: bytes = b"begun") -> PartName:
    writer = store.parts.create(key_of(number), fence, PartState(url_of(number), Validators()))
    writer.write(data)
    writer.close()
    return writer.name


def files(store: Storage) -> set[str]:
    """Name all blobs there are, by their digests' hex digits."""
    return {found.digest.hex for found in store.blobs.blobs()}


def state(store: Storage, digest: Digest) -> str | None:
    row = store.ledger.blobs_of([str(digest)]).result().get(str(digest))
    return None if row is None else row.state


def assert_whole(store: Storage) -> None:
    """Every done job and every completion names a blob that is present, there and right (I5, I15)."""
    assert store.ledger.invariant_violations().result() == []
    after = 0
    while page := store.ledger.jobs(after=after).result():
        after = page[-1].id
        for job in page:
            digests = {one.digest for one in store.ledger.details(job.id).result().completions}
            digests |= {job.digest} if job.digest else set()
            for digest in digests:
                assert store.blobs.verify(Digest.parse(digest)), f"{job.url} names {digest}"
                assert state(store, Digest.parse(digest)) == "present"


def flip(path: Path, at: int = 0) -> None:
    """Turn one bit over in a file, whatever its mode."""
    path.chmod(0o644)
    with path.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 1]))
    path.chmod(0o444)
