"""Maintenance: nothing in use is ever removed, damage is found, a lost ledger is made anew.

Rows are those of the design (I…, F…).
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ledger_kit import raw
from support.stores import (
    assert_whole,
    claim,
    complete,
    fetch,
    files,
    flip,
    key_of,
    open_store,
    part_of,
    publish,
    sha,
    state,
    url_of,
)

from scrapy_streaming.exceptions import BlobGoing, LedgerError, StoreError
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import Done, Granted, JobState
from scrapy_streaming.storage import maintenance
from scrapy_streaming.storage.blobs.files import BlobFile
from scrapy_streaming.storage.blobs.local import LocalBlobStore
from scrapy_streaming.storage.ledger import Admin, JobRequest
from scrapy_streaming.storage.ledger.commands import verb
from scrapy_streaming.storage.maintenance import Verified, collect
from scrapy_streaming.storage.store import Storage, Use

OLD, NEW, OTHER = b"old" * 1000, b"new" * 900, b"other" * 800
Opener = Callable[..., Storage]


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest) -> str | None:
    return request.getfixturevalue("postgres_url") if request.param == "postgres" else None


@pytest.fixture
def opened(store: Path, database: str | None) -> Iterator[Opener]:
    stores: list[Storage] = []

    def make(use: Use = Use.CRAWL, **values: Any) -> Storage:
        stores.append(open_store(store, database, use, **values))
        return stores[-1]

    yield make
    for one in stores:
        one.close()


@pytest.fixture
def crawl(opened: Opener) -> Storage:
    return opened()


def later() -> None:
    """Let what was just made be older than a grace of nothing."""
    time.sleep(0.02)


def counts(store: Storage, **how: Any) -> dict[str, int]:
    later()
    return collect(store, grace=how.pop("grace", 0.0), **how).counts


# -- gc: what goes ---------------------------------------------------------------------------


def test_a_blob_that_was_published_and_never_recorded_goes(crawl: Storage) -> None:
    fetch(crawl, 1, OLD)
    orphan = publish(crawl, NEW)
    later()
    result = collect(crawl, grace=0.0)
    assert result.counts == {"orphans": 1}
    assert result.bytes == len(NEW)
    assert files(crawl) == {sha(OLD)}
    assert state(crawl, orphan) == "missing"
    fetch(crawl, 2, NEW)
    assert_whole(crawl)
    assert counts(crawl) == {}


def test_a_dry_run_lists_and_changes_nothing(crawl: Storage) -> None:
    orphan, part = publish(crawl, NEW), part_of(crawl, 7)
    told = []
    later()
    before = sorted(path for path in crawl.blobs.root.rglob("*") if "maintenance" not in path.name)
    result = collect(crawl, grace=0.0, dry_run=True, removed=lambda *what: told.append(what))
    assert result.counts == {"parts": 1, "orphans": 1}
    assert [(kind, Path(path).name, size) for kind, path, size in told] == [
        ("parts", part.part, 5),
        ("orphans", orphan.hex, len(NEW)),
    ]
    assert before == sorted(path for path in crawl.blobs.root.rglob("*") if "maintenance" not in path.name)
    assert state(crawl, orphan) is None


def test_what_is_younger_than_the_grace_time_stays(crawl: Storage) -> None:
    publish(crawl, NEW)
    part_of(crawl, 7)
    assert counts(crawl, grace=60.0) == {}
    assert files(crawl) == {sha(NEW)}


def test_beside_another_worker_the_grace_time_is_long(opened: Opener) -> None:
    first, second = opened(), opened()
    publish(second, NEW)
    later()
    result = collect(first, grace=0.0)
    assert (result.counts, result.grace) == ({}, maintenance.SETTLING)
    second.close()
    assert counts(first) == {"orphans": 1}


@pytest.mark.parametrize("mode", ["hardlink", "symlink"])
def test_a_blob_with_a_name_stays(opened: Opener, mode: str) -> None:
    store = opened(STREAMING_LINK_MODE=mode)
    digest = publish(store, NEW)
    store.blobs.name(digest, "full/deep/er/name")
    assert counts(store) == {}
    (store.blobs.root / "full/deep/er/name").unlink()
    assert counts(store) == {"orphans": 1}


def test_a_copy_that_is_named_does_not_keep_the_blob(crawl: Storage) -> None:
    crawl.blobs.name(publish(crawl, NEW), "full/name")
    assert counts(crawl) == {"orphans": 1}
    assert (crawl.blobs.root / "full/name").read_bytes() == NEW


def test_rows_of_rebuild_keep_their_blobs(crawl: Storage) -> None:
    publish(crawl, NEW)
    assert maintenance.rebuild(crawl).adopted == 1
    assert counts(crawl, superseded=True) == {}


def test_superseded_bytes_go_only_when_asked_for(crawl: Storage) -> None:
    fetch(crawl, 1, OLD)
    fetch(crawl, 1, NEW)
    assert counts(crawl) == {}
    assert counts(crawl, superseded=True, dry_run=True) == {"superseded": 1}
    assert counts(crawl, superseded=True, grace=60.0) == {}
    assert_whole(crawl)
    assert counts(crawl, superseded=True) == {"superseded": 1}
    assert files(crawl) == {sha(NEW)}
    assert_whole(crawl)
    [job] = crawl.ledger.find(url=url_of(1)).result()
    assert [one.generation for one in crawl.ledger.details(job.id).result().completions] == [2]


def test_superseded_bytes_that_another_job_names_stay(crawl: Storage) -> None:
    fetch(crawl, 1, OLD)
    fetch(crawl, 2, OLD)
    fetch(crawl, 1, NEW)
    assert counts(crawl, superseded=True) == {}
    assert_whole(crawl)


def test_superseded_bytes_stay_while_a_claim_on_the_url_runs(crawl: Storage) -> None:
    """It may have been told to build on them, and be answered with 304."""
    fetch(crawl, 1, OLD)
    told = claim(crawl, 1, refresh_before=math.inf)
    assert told.known is not None
    other = crawl.ledger.claim("ab" * 32, _same_url(1)).result()
    assert isinstance(other, Granted)
    publish(crawl, NEW)
    complete(crawl, other.lease, 1, NEW)
    assert counts(crawl, superseded=True) == {}
    crawl.ledger.complete(told.lease, told.known).result()
    assert_whole(crawl)


def _same_url(number: int) -> Any:
    from scrapy_streaming.storage.ledger import JobRequest

    return JobRequest("other", "", url_of(number), sha(b"GET"))


def test_parts_go_by_the_state_of_their_job(crawl: Storage) -> None:
    """I15: never one of a job that is ready or leased."""
    fetch(crawl, 1, OLD)
    claim(crawl, 2)
    crawl.ledger.release(claim(crawl, 3).lease).result()
    crawl.ledger.fail(claim(crawl, 4).lease, "bad-status-404", "gone", permanent=True).result()
    names = {number: part_of(crawl, number) for number in (1, 2, 3, 4, 5)}
    assert counts(crawl) == {"parts": 3}
    left = {path.name for path in crawl.parts.directory.iterdir()}
    assert left == {names[2].part, names[2].sidecar, names[3].part, names[3].sidecar}


def test_a_part_that_is_written_stays_whatever_the_ledger_says(crawl: Storage) -> None:
    from scrapy_streaming.protocol.parts import PartState
    from scrapy_streaming.protocol.validators import Validators

    writer = crawl.parts.create(key_of(9), 1, PartState(url_of(9), Validators()))
    assert counts(crawl) == {}
    writer.close()
    assert counts(crawl) == {"parts": 1}


def test_leftovers_of_killed_processes_go_and_nothing_else(
    crawl: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F24: what is not of our grammar, or no plain file, is not touched."""
    digest = fetch(crawl, 1, OLD)
    own, shard = crawl.parts.directory.parent, crawl.blobs.path(digest).parent
    (crawl.blobs.root / "full" / "mine").mkdir()
    ours = [
        shard / f".{digest.hex}.{'a' * 16}.tmp",
        crawl.blobs.root / "full" / f".{'b' * 32}.tmp",
        crawl.parts.directory / f"{key_of(1)}.1-0.json.tmp",
        own / "workers" / f".host-12-{'c' * 16}.tmp",
        own / f"store.{'d' * 16}.tmp",
    ]
    theirs = [
        shard / "notes.tmp",
        crawl.blobs.root / "full" / "mine" / ".hidden.tmp",
        crawl.parts.directory / "README",
        crawl.parts.directory / f"{key_of(1)[:-1]}.1-0.part",
        own / "workers" / "README.tmp",
        own / "keep.tmp",
        crawl.blobs.root / "blobs" / "sha256" / "zz",
    ]
    for path in (*ours, *theirs):
        path.write_bytes(b"left")
    target = tmp_path / "target"
    target.write_bytes(b"mine")
    planted = crawl.parts.directory / f"{key_of(8)}.1-0.part"
    planted.symlink_to(target)
    os.mkfifo(crawl.parts.directory / f"{key_of(8)}.2-0.part")
    assert counts(crawl) == {"temporary": 2}, "whoever just starts may have the others"
    monkeypatch.setattr("scrapy_streaming.storage.maintenance.collecting.SETTLING", 0.0)
    assert counts(crawl) == {"temporary": 3}
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in theirs)
    assert planted.is_symlink()
    assert target.read_bytes() == b"mine"


@pytest.mark.proves("F24")
def test_planted_links_are_not_followed(crawl: Storage, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / sha(NEW)).write_bytes(NEW)
    top = crawl.blobs.root / "blobs" / "sha256"
    fetch(crawl, 1, OLD)
    shard = top / sha(NEW)[:2]
    shard.symlink_to(outside)
    linked = crawl.blobs.path(Digest(sha(OLD))).parent / ("e" * 64)
    linked.with_name(sha(OLD)[:2] + "e" * 62).symlink_to(outside / sha(NEW))
    (crawl.blobs.root / "blobs" / ".trash").symlink_to(outside)
    assert counts(crawl) == {}
    assert maintenance.verify(crawl, repair=True).findings == []
    orphan = publish(crawl, OTHER)
    later()
    with pytest.raises(StoreError, match="not a plain directory"):
        collect(crawl, grace=0.0)
    assert {path.name for path in outside.iterdir()} == {sha(NEW)}
    assert crawl.blobs.verify(orphan)


def test_one_looks_after_a_store_at_a_time(opened: Opener) -> None:
    first, second = opened(), opened()
    with maintenance.common.alone(first):
        with pytest.raises(maintenance.MaintenanceRuns, match="maintenance-runs"):
            collect(second, grace=0.0)
        assert maintenance.reconcile(second, history_seconds=0.0) == maintenance.Reconciled()


# -- gc: beside crawls -----------------------------------------------------------------------


def between(monkeypatch: pytest.MonkeyPatch, when: str, what: Callable[[], object]) -> None:
    """Do *what* once, when ``gc`` comes to a point of its protocol."""
    done = []

    def passing(name: str) -> None:
        if name == when and not done:
            done.append(name)
            what()

    monkeypatch.setattr("scrapy_streaming.storage.maintenance.collecting.failpoint", passing)


@pytest.mark.proves("I15", "F26")
@pytest.mark.long_on_postgres
@pytest.mark.parametrize("when", ["gc-marked", "gc-trashed", "gc-recorded"])
def test_a_blob_that_is_published_again_meanwhile_is_kept(
    crawl: Storage, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Whoever vouches for the orphan and records it, at each point, has it afterwards."""
    publish(crawl, NEW)
    lease = claim(crawl, 1).lease
    between(monkeypatch, when, lambda: publish(crawl, NEW))
    counts(crawl)
    complete(crawl, lease, 1, NEW)
    assert_whole(crawl)


@pytest.mark.proves("F26")
def test_without_the_time_of_access_such_a_blob_is_lost(
    crawl: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant of the test before."""
    monkeypatch.setattr(BlobFile, "same", lambda self, now: os.path.samestat(self.info, now))
    publish(crawl, NEW)
    lease = claim(crawl, 1).lease
    between(monkeypatch, "gc-marked", lambda: publish(crawl, NEW))
    counts(crawl)
    complete(crawl, lease, 1, NEW)
    with pytest.raises(AssertionError, match="names sha256"):
        assert_whole(crawl)


def told_of_old(store: Storage) -> Granted:
    """Return a claim that was told of OLD, which only an old generation names by now.

    Its job is given back, so nothing keeps OLD; then it is taken as if it never had been.
    """
    fetch(store, 1, OLD)
    fetch(store, 1, NEW)
    return claim(store, 2)


@pytest.mark.proves("I15", "F26")
def test_nobody_completes_with_a_blob_that_is_being_collected(
    crawl: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``deleting``: a completion that published nothing is refused, and nothing is recorded."""
    granted = told_of_old(crawl)

    def try_it() -> None:
        with pytest.raises(BlobGoing):
            complete(crawl, granted.lease, 2, OLD)

    between(monkeypatch, "gc-trashed", try_it)
    assert counts(crawl, superseded=True) == {"superseded": 1}
    assert_whole(crawl)


@pytest.mark.proves("F26")
def test_without_the_mark_such_a_completion_names_nothing(
    crawl: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant of the test before: nothing is marked, and what is not marked is deleted all the same."""
    granted = told_of_old(crawl)
    marked = verb(lambda ledger, session, digests, age: frozenset(digests))
    monkeypatch.setattr(Admin, "mark_superseded_deleting", marked)
    missing = verb(lambda ledger, session, digests: frozenset(digests or ()))
    monkeypatch.setattr(Admin, "finish_deletion", missing)
    between(monkeypatch, "gc-trashed", lambda: complete(crawl, granted.lease, 2, OLD))
    counts(crawl, superseded=True)
    with pytest.raises(AssertionError, match="names sha256"):
        assert_whole(crawl)


@pytest.mark.proves("I15")
def test_a_blob_that_is_recorded_after_the_mark_grew_old_is_put_back(
    crawl: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ``gc`` that stood still for long finds that others went on."""
    publish(crawl, NEW)
    lease = claim(crawl, 1).lease

    def record() -> None:
        crawl.ledger.set_blob_state(f"sha256:{sha(NEW)}", "present", ["deleting"]).result()
        complete(crawl, lease, 1, NEW)

    between(monkeypatch, "gc-trashed", record)
    later()
    result = collect(crawl, grace=0.0)
    assert (result.counts, result.restored) == ({}, 1)
    assert_whole(crawl)


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from support.stores import open_store
from scrapy_streaming.storage.maintenance import collect
store = open_store(Path({root!r}), {url!r})
collect(store, grace=0.0, superseded=True)
"""


@pytest.mark.proves("I15", "F26")
@pytest.mark.long_on_postgres
@pytest.mark.parametrize("when", ["gc-marked", "gc-trashed", "gc-recorded"])
def test_a_killed_gc_loses_nothing(opened: Opener, store: Path, database: str | None, when: str) -> None:
    first = opened()
    fetch(first, 1, OLD)
    fetch(first, 1, OTHER)
    orphan = publish(first, NEW)
    first.close()
    later()
    code = KILLED.format(tests=str(Path(__file__).parents[1]), root=str(store), url=database)
    environment = os.environ | {"SCRAPY_STREAMING_FAILPOINTS": f"{when}=kill"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False, timeout=60)
    assert done.returncode == -9
    crawl = opened()
    if when == "gc-trashed":
        # recorded as it was before: as a ledger put back from a backup would have it
        crawl.ledger.adopt_blobs({str(orphan): len(NEW)}).result()
        crawl.ledger.finish_deletion(None).result()
        crawl.ledger.adopt_blobs({str(orphan): len(NEW)}).result()
        assert maintenance.reconcile(crawl, history_seconds=1e9).restored == 1
        assert crawl.blobs.verify(orphan)
    counts(crawl, superseded=True)
    fetch(crawl, 2, NEW)
    assert_whole(crawl)
    assert not list((store / "blobs" / ".trash").iterdir())
    assert files(crawl) == {sha(NEW), sha(OTHER)}


WORKER = """
import os, random, select, sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from support.stores import claim, fetch, open_store, publish
store = open_store(Path({root!r}), {url!r})
rng, done = random.Random({seed}), 0
print("open", flush=True)
while done <= 10 or not select.select([sys.stdin], [], [], 0)[0]:  # until the test closes it
    data = b"%d" % rng.randrange(60) * 50
    if rng.random() < 0.5:
        publish(store, data)   # and die before it is recorded
    else:
        fetch(store, {seed} * 1000 + rng.randrange(4), data)
        done += 1
    time.sleep(rng.random() * 0.05)
store.close()
print(done)
"""


@pytest.mark.long_on_postgres
@pytest.mark.proves("I15", "F26")
def test_collecting_beside_publishing_processes_loses_nothing(
    opened: Opener, store: Path, database: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixty contents, each published twice a second, half of them never recorded."""
    crawl = opened()
    code = {"tests": str(Path(__file__).parents[1]), "root": str(store), "url": database}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER.format(seed=seed, **code)], text=True, **pipes)
        for seed in range(1, 5)
    ]
    assert [worker.stdout.readline() for worker in workers] == ["open\n"] * 4
    monkeypatch.setattr("scrapy_streaming.storage.maintenance.collecting.SETTLING", 0.5)
    removed, rounds, began = 0, 0, time.monotonic()
    while time.monotonic() < began + 5 or ((removed == 0 or rounds < 6) and time.monotonic() < began + 60):
        result = collect(crawl, grace=0.0, superseded=True)
        removed, rounds = removed + sum(result.counts.values()), rounds + 1
    said = [int(worker.communicate("")[0]) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4
    assert min(said) > 10
    assert rounds > 5
    assert removed > 0
    assert_whole(crawl)


# -- verify ----------------------------------------------------------------------------------


def kinds(result: Verified) -> dict[str, str]:
    return {finding.digest.removeprefix("sha256:"): finding.kind for finding in result.findings}


@pytest.mark.proves("F18")
def test_verify_finds_all_damage_and_the_next_claim_repairs_it(crawl: Storage) -> None:
    bodies = {number: random.Random(number).randbytes(5000 + number) for number in range(12)}
    for number, data in bodies.items():
        fetch(crawl, number, data)
    unrecorded = publish(crawl, OTHER)
    for number in (0, 1, 2):
        flip(crawl.blobs.path(Digest(sha(bodies[number]))), at=number * 1500)
    short = crawl.blobs.path(Digest(sha(bodies[3])))
    short.chmod(0o644)
    os.truncate(short, 10)
    crawl.blobs.path(Digest(sha(bodies[4]))).unlink()
    expected = {sha(bodies[n]): "bad-bytes" for n in (0, 1, 2)} | {
        sha(bodies[3]): "wrong-size",
        sha(bodies[4]): "missing",
        unrecorded.hex: "unrecorded",
    }
    looked = maintenance.verify(crawl)
    assert kinds(looked) == expected
    assert (looked.blobs, looked.good, looked.damaged) == (12, 7, 5)
    assert state(crawl, Digest(sha(bodies[0]))) == "present", "only looked at"
    repaired = maintenance.verify(crawl, repair=True)
    assert kinds(repaired) == expected
    assert all(finding.repaired for finding in repaired.findings)
    kept = [path.name for path in (crawl.parts.directory.parent / "quarantine").iterdir()]
    assert sorted(name[:64] for name in kept) == sorted(sha(bodies[n]) for n in (0, 1, 2, 3))
    assert kinds(maintenance.verify(crawl)) == {}
    assert crawl.blobs.verify(Digest(sha(bodies[4]))), "made again from its name"
    for number in range(4):
        granted = claim(crawl, number)
        publish(crawl, bodies[number])
        complete(crawl, granted.lease, number, bodies[number])
    assert_whole(crawl)
    assert maintenance.verify(crawl).good == 13


def test_verify_notes_when_it_was(crawl: Storage) -> None:
    digest = fetch(crawl, 1, OLD)
    assert crawl.ledger.blobs_of([str(digest)]).result()[str(digest)].verified_at is None
    maintenance.verify(crawl)
    found = crawl.ledger.blobs_of([str(digest)]).result()[str(digest)].verified_at
    assert found is not None
    assert abs(found - time.time()) < 60


def test_bytes_that_are_back_are_recorded_as_present(crawl: Storage) -> None:
    digest = fetch(crawl, 1, OLD)
    crawl.ledger.set_blob_state(str(digest), "missing", ["present"]).result()
    assert kinds(maintenance.verify(crawl)) == {digest.hex: "stale-record"}
    maintenance.verify(crawl, repair=True)
    assert_whole(crawl)


def test_a_blob_that_is_replaced_while_it_is_judged_is_not_taken_away(
    crawl: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = fetch(crawl, 1, OLD)
    flip(crawl.blobs.path(digest))
    real = LocalBlobStore.set_aside

    def replaced(self: LocalBlobStore, found: Any) -> bool:
        publish(crawl, OLD)
        return real(self, found)

    monkeypatch.setattr(LocalBlobStore, "set_aside", replaced)
    [finding] = maintenance.verify(crawl, repair=True).findings
    assert finding.repaired == "replaced by good bytes meanwhile"
    assert_whole(crawl)


def test_a_pipe_in_a_blobs_place_is_missing_bytes(crawl: Storage) -> None:
    """F24: and nobody waits for its writer."""
    digest = fetch(crawl, 1, OLD)
    crawl.blobs.path(digest).unlink()
    os.mkfifo(crawl.blobs.path(digest))
    assert kinds(maintenance.verify(crawl, repair=True)) == {digest.hex: "missing"}
    fetch(crawl, 1, OLD)
    assert_whole(crawl)


@pytest.mark.proves("F18")
def test_verify_reads_names_that_are_copies_and_makes_them_again(crawl: Storage) -> None:
    """R77, rule 13b: other bytes are kept, whatever the times say; what is another blob's is no damage."""
    digests = {number: fetch(crawl, number, b"%d" % number * 1000) for number in range(8)}
    root = crawl.blobs.root

    def spoil(number: int, data: bytes) -> None:
        info = (root / f"full/{number}").stat()
        (root / f"full/{number}").write_bytes(data)
        os.utime(root / f"full/{number}", ns=(info.st_atime_ns, info.st_mtime_ns))

    spoil(1, b"1" * 999 + b"0")
    spoil(2, b"")
    spoil(3, b"4" * 1000)  # another blob's: a crawl may just be moving the name
    (root / "full/4").unlink()
    (root / "full/4").hardlink_to(crawl.blobs.path(digests[4]))
    (root / "full/5").unlink()
    (root / "full/6").unlink()
    (root / "full/6").symlink_to("5")
    flip(crawl.blobs.path(digests[7]))
    looked = maintenance.verify(crawl)
    expected = {digests[1].hex: "bad-name", digests[2].hex: "bad-name", digests[7].hex: "bad-bytes"}
    assert kinds(looked) == expected
    assert (looked.names, looked.damaged) == (4, 3)
    assert (root / "full/2").read_bytes() == b"", "only looked at"
    assert kinds(maintenance.verify(crawl, repair=True)) == expected
    for number in (1, 2):
        assert (root / f"full/{number}").read_bytes() == b"%d" % number * 1000
    kept = [
        path for path in (crawl.parts.directory.parent / "quarantine").iterdir() if path.suffix == ".name"
    ]
    assert {path.read_bytes() for path in kept} == {b"1" * 999 + b"0", b""}
    assert kinds(maintenance.verify(crawl)) == {}


def test_a_name_that_is_moved_while_it_is_judged_is_left_alone(
    crawl: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R77."""
    fetch(crawl, 1, OLD)
    path = crawl.blobs.root / "full/1"
    path.write_bytes(b"other")
    real = LocalBlobStore.has

    def moved(self: LocalBlobStore, digest: Digest, size: int) -> bool:
        path.write_bytes(b"newer")
        return real(self, digest, size)

    monkeypatch.setattr(LocalBlobStore, "has", moved)
    [finding] = maintenance.verify(crawl, repair=True).findings
    assert (finding.kind, finding.repaired) == ("bad-name", "")
    assert path.read_bytes() == b"newer"


def test_progress_is_told(crawl: Storage) -> None:
    fetch(crawl, 1, OLD)
    told = []
    maintenance.verify(crawl, progress=lambda *what: told.append(what))
    assert told == [(1, len(OLD)), (2, 2 * len(OLD))]


def test_an_interruption_ends_hashing_at_once(crawl: Storage) -> None:
    for number in range(300):
        fetch(crawl, number, b"%d" % number)

    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        maintenance.verify(crawl, progress=interrupt)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ss-hash")]
    assert_whole(crawl)


# -- rebuild ---------------------------------------------------------------------------------


@pytest.mark.proves("F13", "I16")
def test_rebuild_records_what_is_there_and_nothing_else(crawl: Storage) -> None:
    fetch(crawl, 1, OLD)
    publish(crawl, NEW)
    bad = publish(crawl, OTHER)
    flip(crawl.blobs.path(bad))
    result = maintenance.rebuild(crawl)
    assert (result.blobs, result.known, result.adopted, result.bad) == (3, 1, 1, [str(bad)])
    assert state(crawl, bad) is None
    assert len(crawl.ledger.jobs().result()) == 1
    assert maintenance.rebuild(crawl).adopted == 0


def test_a_damaged_ledger_is_moved_with_its_logs_and_never_over_another(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite3"
    seen = set()
    for turn in range(3):
        for end in ("", "-wal", "-shm"):
            Path(f"{path}{end}").write_text(f"{turn}{end}")
        moved = maintenance.move_aside(path)
        assert not list(tmp_path.glob("ledger.sqlite3")) + list(tmp_path.glob("ledger.sqlite3-*"))
        assert [Path(f"{moved}{end}").read_text() for end in ("", "-wal", "-shm")] == [
            f"{turn}", f"{turn}-wal", f"{turn}-shm",
        ]  # fmt: skip
        seen.add(moved)
    assert len(seen) == 3
    assert len(list(tmp_path.iterdir())) == 9


# -- reconcile -------------------------------------------------------------------------------


def test_reconcile_keeps_all_that_may_be_of_use(crawl: Storage) -> None:
    fetch(crawl, 1, OLD)
    publish(crawl, NEW)
    part_of(crawl, 1)
    part_of(crawl, 9)
    assert maintenance.reconcile(crawl, history_seconds=1e9) == maintenance.Reconciled()
    assert len(list(crawl.parts.directory.iterdir())) == 4
    assert files(crawl) == {sha(OLD), sha(NEW)}


def test_reconcile_removes_old_parts_and_old_history(crawl: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch(crawl, 1, OLD)
    crawl.ledger.fail(claim(crawl, 4).lease, "bad-status-404", "gone", permanent=True).result()
    part_of(crawl, 1)
    part_of(crawl, 4)
    part_of(crawl, 9)
    (crawl.parts.directory / f"{key_of(4)}.9-0.json.tmp").write_bytes(b"")
    monkeypatch.setattr("scrapy_streaming.storage.maintenance.collecting.SETTLING", 0.0)
    later()
    done = maintenance.reconcile(crawl, history_seconds=0.0, grace=0.0)
    assert (done.parts, done.temporary, done.restored) == (2, 1, 0)
    assert done.events == 4
    assert {path.name[:64] for path in crawl.parts.directory.iterdir()} == {key_of(4)}
    assert crawl.ledger.table_rows().result()["ss_event"] == 0


# -- after an older copy of the ledger was put back ------------------------------------------


def older(store: Storage) -> None:
    """Have the ledger be behind what its store has seen, as an older copy is."""
    assert store.ledger.raise_epoch(store.ledger.epoch + 5).result().unread


@pytest.mark.proves("I15", "I16")
def test_gc_refuses_until_the_store_has_been_read(crawl: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """And at the start of a crawl nothing goes on the word of the older ledger either."""
    monkeypatch.setattr("scrapy_streaming.storage.maintenance.collecting.SETTLING", 0.0)
    fetch(crawl, 1, OLD)
    publish(crawl, NEW)
    part_of(crawl, 1)
    part_of(crawl, 9)
    older(crawl)
    for how in ({}, {"superseded": True}, {"dry_run": True}):
        with pytest.raises(LedgerError, match=r"\(ledger-put-back\)"):
            counts(crawl, **how)
    found = maintenance.health(crawl)
    assert (found.status, [text[-17:] for text in found.warnings]) == ("degraded", ["(ledger-put-back)"])
    stop = threading.Event()
    stop.set()
    done = maintenance.reconcile(crawl, history_seconds=1e9, grace=0.0, stop=stop)
    assert (done, state(crawl, Digest(sha(NEW)))) == (maintenance.Reconciled(), None)
    done = maintenance.reconcile(crawl, history_seconds=1e9, grace=0.0)
    assert (done.parts, done.read) == (0, maintenance.Rebuilt(blobs=1, bytes=len(NEW), adopted=1))
    assert len(list(crawl.parts.directory.iterdir())) == 4
    assert files(crawl) == {sha(OLD), sha(NEW)}
    assert maintenance.health(crawl).status == "healthy"
    assert counts(crawl, superseded=True) == {"parts": 2}
    assert files(crawl) == {sha(OLD), sha(NEW)}


@pytest.mark.proves("I15", "I16")
def test_a_ledger_put_back_in_the_middle_of_gc_takes_nothing(
    crawl: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each mark looks, in its own transaction."""
    publish(crawl, OLD)
    monkeypatch.setattr(maintenance.collecting._Round, "sweep_store", lambda _: older(crawl) or frozenset())
    with pytest.raises(LedgerError, match="ledger-put-back"):
        counts(crawl)
    assert files(crawl) == {sha(OLD)}


@pytest.mark.proves("I16")
def test_a_copy_put_back_while_the_store_is_read_has_it_read_again(crawl: Storage) -> None:
    older(crawl)
    before = crawl.ledger.standing().result()
    older(crawl)
    assert crawl.ledger.mark_read(before).result() is False
    assert crawl.ledger.standing().result().unread
    assert maintenance.rebuild(crawl).blobs == 0
    assert not crawl.ledger.standing().result().unread


@pytest.mark.proves("I16", "F12")
def test_a_ledger_put_back_under_a_running_crawl_replays_nothing(crawl: Storage) -> None:
    """No claim of who saw a later epoch is answered from an earlier one."""
    fetch(crawl, 1, OLD)
    request = JobRequest("work", "", url_of(1), sha(b"GET"))
    assert isinstance(crawl.ledger.claim(key_of(1), request).result(), Done)
    raw(crawl.ledger, lambda connection: connection.execute("UPDATE ss_meta SET epoch = 1"))
    assert crawl.ledger.standing().result().unread
    granted = crawl.ledger.claim(key_of(1), request).result()
    assert isinstance(granted, Granted)
    assert granted.known is not None


# -- health ----------------------------------------------------------------------------------


def test_a_sound_store_is_healthy(crawl: Storage) -> None:
    fetch(crawl, 1, OLD)
    found = maintenance.health(crawl)
    assert (found.status, found.errors, found.warnings) == ("healthy", [], [])
    assert found.jobs == {"ready": 0, "leased": 0, "done": 1, "failed": 0, "dead": 0}
    assert found.tables["ss_job"] == 1
    assert found.schema_version == crawl.ledger.schema_version().result()


def test_what_mends_itself_degrades(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = opened(STREAMING_MAX_ATTEMPTS=1)
    fetch(gone, 1, OLD)
    fetch(gone, 2, NEW)
    claim(gone, 3)
    gone.close()
    crawl = opened(STREAMING_MAX_ATTEMPTS=1)
    crawl.ledger.set_blob_state(f"sha256:{sha(OLD)}", "missing", ["present"]).result()
    crawl.ledger.set_blob_state(f"sha256:{sha(NEW)}", "quarantined", ["present"]).result()
    publish(crawl, OTHER)
    counts(crawl)  # its row is missing, and nobody misses it
    found = maintenance.health(crawl)
    assert found.status == "degraded"
    assert [text.split(":")[0] for text in found.warnings] == [
        "1 blobs in use are missing",
        "1 blobs in use are quarantined",
        "1 jobs are leased to workers that ended",
    ]
    monkeypatch.setattr(maintenance.inspection, "LITTLE_SPACE", 1 << 62)
    assert any("little space" in text for text in maintenance.health(crawl).warnings)


BROKEN = {
    "I4: done without a completion": "DELETE FROM ss_completion",
    "I5: done without a blob": "UPDATE ss_blob SET state = 'deleting'",
    "completions ahead": "UPDATE ss_completion SET fence = fence + 1",
}


@pytest.mark.proves("I4", "I5")
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_invariant_is_unhealthy(crawl: Storage, what: str) -> None:
    fetch(crawl, 1, OLD)
    crawl.ledger._writer.submit(lambda s: s.connection.exec_driver_sql(BROKEN[what])).result()
    found = maintenance.health(crawl)
    assert found.status == "unhealthy"
    assert [error for error in found.errors if error.startswith(what)]


# -- the ledger's verbs of upkeep ------------------------------------------------------------


def test_jobs_come_in_pages_by_state(crawl: Storage) -> None:
    for number in range(5):
        fetch(crawl, number, b"%d" % number)
    claim(crawl, 5)
    pages, after = [], 0
    while page := crawl.ledger.jobs(JobState.DONE, after=after, limit=2).result():
        pages.append([job.url for job in page])
        after = page[-1].id
    assert [len(page) for page in pages] == [2, 2, 1]
    assert [job.url for job in crawl.ledger.jobs(JobState.LEASED).result()] == [url_of(5)]


def test_jobs_are_found_by_url_key_and_digest(crawl: Storage) -> None:
    fetch(crawl, 1, OLD)
    fetch(crawl, 1, NEW)
    fetch(crawl, 2, OTHER)
    for how in ({"url": url_of(1)}, {"prefix": key_of(1)[:6]}, {"prefix": sha(NEW)}, {"prefix": sha(OLD)}):
        assert [job.key for job in crawl.ledger.find(**how).result()] == [key_of(1)]
    assert crawl.ledger.find(prefix="0" * 64).result() == []
    assert crawl.ledger.keys(key_of(2)[:8]).result() == [key_of(2)]
    assert [row.digest for row in crawl.ledger.blobs_like(sha(OLD)[:8]).result()] == [f"sha256:{sha(OLD)}"]
    assert crawl.ledger.urls_of(f"sha256:{sha(NEW)}").result() == [url_of(1)]
    [job] = crawl.ledger.find(url=url_of(1)).result()
    details = crawl.ledger.details(job.id).result()
    assert [one.path for one in details.completions] == ["full/1", "full/1"]
    assert [one.to_state for one in details.history] == ["leased", "done"] * 2
    assert crawl.ledger.states_of([key_of(1), key_of(9)]).result() == {key_of(1): JobState.DONE}
