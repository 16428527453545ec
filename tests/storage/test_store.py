"""Opening a store: one identity whoever comes first, a clear word for what is in the way, nothing left open.

Rows are those of the design (I…, E…, F…, storage rule …).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ledger_kit import KEY, hex_of, known
from support.command import run_here
from support.stores import Source, open_files, part_of, publish, settings_for, state

import scrapy_streaming
from scrapy_streaming.exceptions import LedgerError, StoreError, StreamingError
from scrapy_streaming.protocol.jobs import Done, Granted, Held
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage import filesystems, identity, maintenance
from scrapy_streaming.storage.filesystems import NETWORK_FILESYSTEMS, filesystem_of
from scrapy_streaming.storage.ledger import JobRequest, Ledger
from scrapy_streaming.storage.store import Storage, Use

ROOT = Path(scrapy_streaming.__file__).parents[1]
REQUEST = JobRequest("work", "artifact", "https://example.org/a.bin", hex_of("GET"))


pytestmark = pytest.mark.usefixtures("no_descriptor_is_leaked")

HELD = JobRequest("work", "artifact", "https://h/", "ab" * 32)


def names_in(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


def refusal(store: Path | str, **values: Any) -> StreamingError:
    """Return the error that opening gives; nothing may stay open after it, and no worker registered."""
    before = open_files()
    with pytest.raises((StoreError, LedgerError)) as caught:
        Storage.open(settings_for(store, **values))
    assert open_files() == before
    workers = Path(store, ".streaming", "workers")
    assert not workers.is_dir() or names_in(workers) == []
    return caught.value


def open_and_close(store: Path | str, **values: Any) -> str:
    opened = Storage.open(settings_for(store, **values))
    opened.close()
    return opened.store_id


# -- new and old stores ----------------------------------------------------------------------


def test_a_new_store_has_what_it_needs_and_shows_no_one_the_rest(store: Path) -> None:
    """Rule 1, E10."""
    opened = Storage.open(settings_for(store / "deep" / "er"))
    own = store / "deep" / "er" / ".streaming"
    names = {entry.name for entry in own.iterdir()}
    assert {"store.json", "parts", "quarantine", "workers", "ledger.sqlite3"} <= names
    assert json.loads((own / "store.json").read_text()) == {
        "format": 1,
        "store_id": opened.store_id,
        "ledger_id": opened.ledger.ledger_id,
        "epoch": 2,
        "unrecorded": False,
    }
    for folder in (own, own / "parts", own / "quarantine", own / "workers"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((own / "ledger.sqlite3").stat().st_mode) == 0o600
    assert names_in(own / "workers") == [opened.worker_id]
    assert opened.notes == ()
    assert not list(own.glob("*.tmp"))
    opened.close()
    opened.close()
    assert names_in(own / "workers") == []


def test_a_store_keeps_its_identity(store: Path, tmp_path: Path) -> None:
    """Rule 1: also when it is moved."""
    first = open_and_close(store)
    assert open_and_close(store) == first
    store.rename(tmp_path / "moved")
    assert open_and_close(tmp_path / "moved") == first
    assert open_and_close(tmp_path / "other") != first


def test_two_open_stores_in_one_process_are_two_workers(store: Path) -> None:
    first, second = Storage.open(settings_for(store)), Storage.open(settings_for(store))
    assert first.store_id == second.store_id
    assert first.worker_id != second.worker_id
    assert set(names_in(store / ".streaming" / "workers")) == {first.worker_id, second.worker_id}
    first.close()
    second.close()


def test_state_may_live_elsewhere(store: Path, tmp_path: Path) -> None:
    """``STREAMING_DIR`` and ``STREAMING_DATABASE_URL``."""
    state = tmp_path / "state"
    identity = open_and_close(
        store, STREAMING_DIR=str(state), STREAMING_DATABASE_URL=f"sqlite:///{tmp_path / 'jobs.db'}"
    )
    assert not (store / ".streaming").exists()
    assert json.loads((state / "store.json").read_text())["store_id"] == identity
    assert (tmp_path / "jobs.db").exists()
    assert not (state / "ledger.sqlite3").exists()


def test_every_new_directory_is_durable_in_its_parent(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules 4 and 11: a durable part in a directory that a power cut takes away is none."""
    synced: set[str] = set()
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.add(str(Path(f"/proc/self/fd/{fd}").readlink()))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    open_and_close(store / "deep" / "er")
    own = store / "deep" / "er" / ".streaming"
    assert {str(path) for path in (store.parent, store, store / "deep", own.parent, own)} <= synced
    synced.clear()
    open_and_close(store.parent / "unsynced", STREAMING_FSYNC=False)
    assert not any("unsynced" in path and path.endswith(("json", "tmp", ".streaming")) for path in synced)


def test_a_store_anybody_may_write_to_is_named(store: Path) -> None:
    """E2."""
    store.mkdir()
    store.chmod(0o777)
    opened = Storage.open(settings_for(store))
    opened.close()
    [note] = opened.notes
    assert str(store) in note
    store.chmod(0o1777)
    opened = Storage.open(settings_for(store))
    opened.close()
    assert opened.notes == ()


# -- what is in the way ----------------------------------------------------------------------


def test_no_store_is_no_store() -> None:
    for uri in ("", "s3://bucket/x"):
        with pytest.raises(StoreError, match="FILES_STORE"):
            Storage.open(StreamingSettings.load(Source(FILES_STORE=uri), {}))


@pytest.mark.proves("F8")
@pytest.mark.parametrize("below", ["", "/below", "/deep/below"])
def test_a_store_in_a_file_cannot_be_used(tmp_path: Path, below: str) -> None:
    """F8: not writable."""
    (tmp_path / "file").write_text("mine")
    error = refusal(f"{tmp_path}/file{below}")
    assert error.reason == "store-not-writable"
    assert "FILES_STORE=" in str(error)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.proves("F8")
def test_a_full_disk_is_said(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F8: and the next try, with room, succeeds."""

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "No space left" in str(refusal(store))
    open_and_close(store)
    assert not list((store / ".streaming").glob("*.tmp"))


def test_state_in_the_store_itself_is_refused(store: Path) -> None:
    """E1: names would stand beside the ledger."""
    error = refusal(store, STREAMING_DIR=str(store / ".." / store.name))
    assert error.reason == "store-unsafe"
    assert "STREAMING_DIR" in str(error)


DAMAGED = {
    "empty": b"",
    "torn": b'{"format": 1, "store_id"',
    "list": b"[]",
    "number": b"7",
    "nothing": b"{}",
    "no text": b"\xff\xfe\x00",
    "deep": b"[" * 60_000,
}


@pytest.mark.proves("I16")
@pytest.mark.parametrize("text", [*DAMAGED.values(), None], ids=[*DAMAGED, "gone"])
def test_a_damaged_identity_is_made_anew_from_the_ledger(store: Path, text: bytes | None) -> None:
    """Rule 13c: what was done stays done; it is said once, and a look changes nothing."""
    first = Storage.open(settings_for(store))
    done_job(first)
    first.close()
    path, before = store / ".streaming" / "store.json", own(store)
    path.unlink() if text is None else path.write_bytes(text)

    look = Storage.open(settings_for(store), Use.MAINTAIN)
    assert look.ledger.counts().result()["done"] == 1
    look.close()
    assert (path.read_bytes() if path.exists() else None) == text

    opened = Storage.open(settings_for(store))
    [note] = opened.notes
    assert "(store-json) and was made anew from the ledger" in note
    assert str(path) in note
    assert isinstance(opened.ledger.claim(KEY, REQUEST).result(), Done)
    opened.close()
    after = own(store)
    assert (after["store_id"], after["ledger_id"]) == (before["store_id"], before["ledger_id"])
    assert after["epoch"] > before["epoch"]
    again = Storage.open(settings_for(store))
    assert again.notes == ()
    again.close()


@pytest.mark.proves("I15", "I16")
@pytest.mark.parametrize("ledger", [None, b""], ids=["gone", "empty"])
def test_a_damaged_identity_without_a_ledger_loses_no_blob(store: Path, ledger: bytes | None) -> None:
    """A new ledger is made; ``gc`` takes nothing before the store has been read."""
    first = Storage.open(settings_for(store))
    stored = publish(first, b"bytes")
    first.close()
    file = store / ".streaming" / "ledger.sqlite3"
    file.unlink() if ledger is None else file.write_bytes(ledger)
    (store / ".streaming" / "store.json").write_bytes(bytes(100))
    opened = Storage.open(settings_for(store))
    assert any("was made anew from nothing" in note for note in opened.notes)
    assert opened.ledger.standing().result().unread
    with pytest.raises(LedgerError, match="ledger-put-back"):
        maintenance.collect(opened, grace=0)
    maintenance.reconcile(opened, history_seconds=0)
    assert state(opened, stored) == "present"
    maintenance.collect(opened, grace=0)
    assert opened.blobs.verify(stored)
    opened.close()
    assert own(store)["ledger_id"] == opened.ledger.ledger_id


@pytest.mark.proves("F13")
def test_a_damaged_identity_beside_a_damaged_ledger_is_rebuilt(store: Path) -> None:
    """One line names the remedy, and the remedy works."""
    open_and_close(store)
    (store / ".streaming" / "store.json").write_bytes(b"")
    ledger = store / ".streaming" / "ledger.sqlite3"
    ledger.write_bytes(b"this is no database" * 1000)
    error = refusal(store)
    assert error.reason == "ledger-corrupt"
    assert "scrapy streaming rebuild" in str(error)
    assert run_here("rebuild", settings_for(store)) == 0
    open_and_close(store)


@pytest.mark.proves("I16")
@pytest.mark.parametrize("damage", [b"", bytes(4096), b"\xff" * 5000], ids=["empty", "zeros", "garbage"])
def test_other_small_files_that_a_power_cut_damaged_stop_nobody(store: Path, damage: bytes) -> None:
    """Locks, workers' files, what stands beside the ledger, and sidecars of parts."""
    first = Storage.open(settings_for(store))
    done_job(first)
    part = part_of(first, 5)
    first.close()
    folder = store / ".streaming"
    beside = [f"ledger.sqlite3-{end}" for end in ("turn", "shm", "wal")]
    worker = f"{socket.gethostname()}-1-{'0' * 16}"
    beside += ["store.lock", "maintenance.lock", "store.0123456789abcdef.tmp"]
    for name in (*beside, f"workers/{worker}", f"parts/{part.sidecar}"):
        (folder / name).write_bytes(damage)
    opened = Storage.open(settings_for(store))
    assert opened.parts.find(part.key) == []  # nothing vouches for it: fetched from its beginning
    assert isinstance(opened.ledger.claim(KEY, REQUEST).result(), Done)
    maintenance.reconcile(opened, history_seconds=0)
    opened.close()
    assert not (folder / "workers" / worker).exists()


@pytest.mark.parametrize("number", [0, 2, "1", None])
def test_another_format_names_the_remedy(store: Path, number: object) -> None:
    """Rule 1."""
    open_and_close(store)
    path = store / ".streaming" / "store.json"
    path.write_text(json.dumps({"format": number, "store_id": "x"}))
    error = refusal(store)
    assert error.reason == "store-format"
    assert "install the version" in str(error)


@pytest.mark.proves("F24")
@pytest.mark.parametrize("kind", ["fifo", "link", "directory"])
def test_a_thing_planted_as_identity_is_refused(store: Path, tmp_path: Path, kind: str) -> None:
    """F24: and nobody waits for a writer of a pipe."""
    own = store / ".streaming"
    own.mkdir(parents=True)
    (tmp_path / "target").write_text('{"format": 1, "store_id": "planted"}')
    if kind == "fifo":
        os.mkfifo(own / "store.json")
    elif kind == "link":
        (own / "store.json").symlink_to(tmp_path / "target")
    else:
        (own / "store.json").mkdir()
    assert isinstance(refusal(store), StoreError)


@pytest.mark.proves("F24")
@pytest.mark.parametrize("name", ["", "/parts", "/quarantine", "/workers"])
def test_a_link_in_a_directorys_place_is_refused(store: Path, tmp_path: Path, name: str) -> None:
    """E2, F24."""
    outside = tmp_path / "outside"
    outside.mkdir()
    path = Path(f"{store}/.streaming{name}")
    path.parent.mkdir(parents=True)
    path.symlink_to(outside)
    error = refusal(store)
    assert error.reason == "store-unsafe"
    assert str(path) in str(error)
    assert list(outside.iterdir()) == []


@pytest.mark.proves("I16")
def test_another_stores_ledger_is_refused(store: Path, tmp_path: Path) -> None:
    """I16, rule 1."""
    open_and_close(store)
    open_and_close(tmp_path / "other")
    ledger = store / ".streaming" / "ledger.sqlite3"
    ledger.write_bytes((tmp_path / "other" / ".streaming" / "ledger.sqlite3").read_bytes())
    error = refusal(store)
    assert isinstance(error, LedgerError)
    assert error.reason == "ledger-foreign"
    assert "name this store's own in STREAMING_DATABASE_URL" in str(error)
    assert "scrapy streaming rebuild" in str(error)


@pytest.mark.proves("I16", "F13")
def test_a_ledger_that_is_gone_is_missed(store: Path) -> None:
    """F13: a store that had one is not silently begun anew; ``rebuild`` may make one."""
    identity = open_and_close(store)
    ledger = store / ".streaming" / "ledger.sqlite3"
    ledger.unlink()
    for _ in range(2):
        error = refusal(store)
        assert error.reason == "ledger-missing"
        assert "scrapy streaming rebuild" in str(error)
    assert not ledger.exists()
    with pytest.raises(LedgerError, match="ledger-missing"):
        Storage.open(settings_for(store), Use.MAINTAIN)
    rebuilt = Storage.open(settings_for(store), Use.REBUILD)
    rebuilt.close()
    assert rebuilt.store_id == identity
    assert open_and_close(store) == identity


@pytest.mark.parametrize("use", [Use.MAINTAIN, Use.REBUILD])
def test_only_a_crawl_makes_a_store(store: Path, use: Use) -> None:
    with pytest.raises(StoreError) as caught:
        Storage.open(settings_for(store), use)
    assert caught.value.reason == "store-missing"
    assert not store.exists()


@pytest.mark.proves("I16")
def test_a_store_with_its_ledger_in_postgresql(store: Path, tmp_path: Path, postgres_url: str) -> None:
    """One store a database: another one's ledger is refused there, too."""
    where = {"STREAMING_DATABASE_URL": postgres_url}
    identity = open_and_close(store, **where)
    assert open_and_close(store, **where) == identity
    assert not (store / ".streaming" / "ledger.sqlite3").exists()
    assert refusal(tmp_path / "other", **where).reason == "ledger-foreign"
    assert refusal(store).reason == "ledger-missing"  # this store's is elsewhere


@pytest.mark.proves("F13")
def test_a_damaged_ledger_is_refused(store: Path) -> None:
    """F13: left as it was."""
    open_and_close(store)
    ledger = store / ".streaming" / "ledger.sqlite3"
    ledger.write_bytes(b"this is no database" * 1000)
    error = refusal(store)
    assert isinstance(error, LedgerError)
    assert str(ledger) in str(error)
    assert ledger.read_bytes() == b"this is no database" * 1000


def test_identity_without_hard_links_is_made_by_rename(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule 2: the next best where links are missing."""

    def no_links(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    first = open_and_close(store)
    assert open_and_close(store) == first


# -- several processes -----------------------------------------------------------------------

OPEN = """
import os, sys
from pathlib import Path
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage.store import Storage
from scrapy_streaming.storage.ledger import JobRequest, Ledger

class Source(dict):
    def getpriority(self, name):
        return 20 if name in self else None

def open_store():
    source = Source(FILES_STORE=sys.argv[1], STREAMING_LEASE_SECONDS=600)
    return Storage.open(StreamingSettings.load(source, {}))
"""

AT_ONCE = (
    OPEN
    + """
children, ready = [], os.pipe()
for _ in range(8):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.read(ready[0], 1)
            storage = open_store()
            storage.close()
            os.write(write, storage.store_id.encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    children.append((child, read))
os.write(ready[1], b"x" * 8)
assert all(os.waitpid(child, 0)[1] == 0 for child, _ in children)
print(*{os.read(read, 100).decode() for _, read in children})
"""
)

CLAIM = (
    OPEN
    + """
storage = open_store()
claim = storage.ledger.claim("ab" * 32, JobRequest("work", "artifact", "https://h/", "ab" * 32)).result()
print(storage.worker_id, type(claim).__name__, flush=True)
sys.stdin.read()
"""
)


@pytest.mark.proves("I20", "F27")
@pytest.mark.parametrize("turn", range(3))
def test_processes_that_open_a_new_store_at_once_agree_on_one_identity(store: Path, turn: int) -> None:
    """I20, F27."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", AT_ONCE, str(store)],
        cwd=ROOT, text=True, check=True, timeout=60, stdout=subprocess.PIPE,
    )  # fmt: skip
    [identity] = done.stdout.split()
    assert open_and_close(store) == identity
    assert not list((store / ".streaming").glob("*.tmp"))
    assert names_in(store / ".streaming" / "workers") == []


@pytest.fixture
def claimer(store: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", CLAIM, str(store)],
        cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as running:  # fmt: skip
        yield running
        running.kill()


@pytest.mark.proves("F1")
def test_a_killed_workers_leases_are_free_at_once_a_live_ones_are_not(
    store: Path, claimer: subprocess.Popen[str]
) -> None:
    """F1: no wait for the lease's end after ``kill -9``; the lock tells the living from the dead."""
    assert claimer.stdout is not None
    worker, claim = claimer.stdout.readline().split()
    assert claim == "Granted"
    with_live_owner = Storage.open(settings_for(store))
    assert isinstance(with_live_owner.ledger.claim("ab" * 32, HELD).result(), Held)
    assert worker in names_in(store / ".streaming" / "workers")
    claimer.send_signal(signal.SIGKILL)
    claimer.wait()
    after = Storage.open(settings_for(store))
    assert isinstance(after.ledger.claim("ab" * 32, HELD).result(), Granted)
    assert set(names_in(store / ".streaming" / "workers")) == {with_live_owner.worker_id, after.worker_id}
    after.close()
    with_live_owner.close()


def test_a_worker_is_locked_before_it_has_a_name(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one that opens at the same moment would take it for dead."""
    seen = []
    real = fcntl.flock

    def flock(fd: int, how: int) -> None:
        seen.append(names_in(store / ".streaming" / "workers"))
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    opened = Storage.open(settings_for(store))
    host = socket.gethostname()
    assert not [name for name in seen[0] if name.startswith(host)]
    opened.close()


def test_workers_of_other_machines_and_odd_files_are_left_alone(store: Path) -> None:
    """E12: a lock on another machine cannot be seen from here."""
    open_and_close(store)
    workers = store / ".streaming" / "workers"
    host = socket.gethostname()
    kept = {f"{host}-other-12-abcdef", f"x{host}-12-abcdef", "README", f"{host}-12-link", f"{host}-12-dir"}
    for name in kept:
        if name.endswith("link"):
            (workers / name).symlink_to("/etc/hostname")
        elif name.endswith("dir"):
            (workers / name).mkdir()
        else:
            (workers / name).touch()
    (workers / f"{host}-12-abcdef").touch()
    open_and_close(store)
    assert set(names_in(workers)) == kept


@pytest.mark.parametrize("broken", ["ledger", "forget"])
def test_nothing_stays_open_when_opening_fails_late(
    store: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fails(*_: object, **__: object) -> Any:
        raise LedgerError("no")

    open_and_close(store)
    if broken == "ledger":
        monkeypatch.setattr(Ledger, "open", fails)
    else:
        (store / ".streaming" / "workers" / f"{socket.gethostname()}-1-ab").touch()
        monkeypatch.setattr(Ledger, "end_worker_leases", fails)
    before = open_files()
    with pytest.raises(LedgerError):
        Storage.open(settings_for(store))
    assert open_files() == before
    monkeypatch.undo()
    open_and_close(store)
    assert names_in(store / ".streaming" / "workers") == []


def test_closing_waits_for_what_the_ledger_was_asked(store: Path) -> None:
    opened = Storage.open(settings_for(store))
    claims = [opened.ledger.claim(hex_of(str(number)), REQUEST) for number in range(50)]
    opened.close()
    assert all(isinstance(claim.result(timeout=0), Granted) for claim in claims)
    connection = sqlite3.connect(store / ".streaming" / "ledger.sqlite3")
    assert connection.execute("SELECT count(*) FROM ss_job").fetchone() == (50,)
    connection.close()


# -- filesystems -----------------------------------------------------------------------------

MOUNTS = r"""
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
22 21 0:5 / /proc rw - proc proc rw
30 21 0:40 / /mnt rw master:2 propagate_from:1 - xfs /dev/sdb1 rw
31 30 0:41 / /mnt/net rw - nfs4 host:/export rw,addr=10.0.0.1
32 31 0:42 / /mnt/net/local rw - btrfs /dev/sdc1 rw
33 30 0:43 / /mnt/with\040a\040space rw - cifs //host/share rw
34 30 0:44 / /mnt/odd\040-\040name\134x rw - fuse.sshfs host:/ rw
35 30 0:45 / /mnt/données rw - nfs host:/d rw
36 30 0:46 / /mnt/twice rw - ext4 /dev/sdd1 rw
37 36 0:47 / /mnt/twice rw - nfs host:/t rw
""".strip()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/home/me/downloads", "ext4"),
        ("/mnt", "xfs"),
        ("/mnt/a", "xfs"),
        ("/mnt/network", "xfs"),
        ("/mnt/net", "nfs4"),
        ("/mnt/net/a/b", "nfs4"),
        ("/mnt/net/local/a", "btrfs"),
        ("/mnt/with a space/a", "cifs"),
        ("/mnt/with", "xfs"),
        ("/mnt/odd - name\\x/a", "fuse.sshfs"),
        ("/mnt/données/a", "nfs"),
        ("/mnt/twice/a", "nfs"),
        ("/mnt/net/../a", "xfs"),
    ],
)
def test_the_innermost_latest_mount_counts(path: str, kind: str) -> None:
    """Rule 2."""
    assert filesystem_of(Path(path), MOUNTS) == kind


def test_the_real_mounts_can_be_read(tmp_path: Path) -> None:
    assert filesystem_of(Path("/proc/self")) == "proc"
    assert filesystem_of(Path("/dev/shm")) == "tmpfs"
    assert filesystem_of(tmp_path) not in NETWORK_FILESYSTEMS


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs"])
def test_a_ledger_on_a_network_filesystem_is_refused_with_advice(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Rule 2; with the ledger on a local disk the store may be there, and parts are copied (rule 7)."""
    monkeypatch.setattr(
        filesystems, "filesystem_of", lambda path: kind if path.is_relative_to(store) else "ext4"
    )
    error = refusal(store)
    assert error.reason == "store-unsafe"
    assert kind in str(error)
    assert "STREAMING_DATABASE_URL" in str(error)
    opened = Storage.open(settings_for(store, STREAMING_DATABASE_URL=f"sqlite:///{tmp_path}/jobs.db"))
    assert not opened.parts.adopt
    opened.close()


@pytest.mark.parametrize(("kind", "adopt"), [("ext4", True), ("fuse.anything", False), (None, False)])
def test_locks_are_believed_only_on_filesystems_known_to_be_local(
    store: Path, monkeypatch: pytest.MonkeyPatch, kind: str | None, adopt: bool
) -> None:
    """Rule 7."""

    def answer(_: Path) -> str | None:
        return kind

    monkeypatch.setattr(filesystems, "filesystem_of", answer)
    opened = Storage.open(settings_for(store))
    assert opened.parts.adopt is adopt
    opened.close()


# -- an older ledger in the ledger's place -----------------------------------------------------


def own(store: Path) -> dict[str, Any]:
    return dict(json.loads((store / ".streaming" / "store.json").read_text()))


def set_epoch(store: Path, epoch: int) -> None:
    """Leave ``store.json`` as a power cut, or an older ledger, would."""
    path = store / ".streaming" / "store.json"
    path.write_text(json.dumps(own(store) | {"epoch": epoch}))


def done_job(opened: Storage) -> None:
    lease = opened.ledger.claim(KEY, REQUEST).result().lease
    opened.ledger.complete(lease, known()).result()


@pytest.mark.proves("I16")
@pytest.mark.parametrize("ahead", [-1, 0, 1, 5])
def test_a_ledger_behind_its_store_is_told_and_asked_again(store: Path, ahead: int) -> None:
    """Also after a power cut between the two: too old an epoch costs nothing, too new one a question."""
    first = Storage.open(settings_for(store))
    done_job(first)
    first.close()
    set_epoch(store, own(store)["epoch"] + ahead)
    opened = Storage.open(settings_for(store))
    claim = opened.ledger.claim(KEY, REQUEST).result()
    assert opened.ledger.standing().result().unread is (ahead > 0)
    assert [note for note in opened.notes if "(ledger-put-back)" in note] == list(opened.notes)
    assert (len(opened.notes), isinstance(claim, Granted)) == (int(ahead > 0), ahead > 0)
    if isinstance(claim, Granted):
        assert claim.known is not None  # so a 304 can confirm it
        opened.ledger.complete(claim.lease, known()).result()
    assert isinstance(opened.ledger.claim(KEY, REQUEST).result(), Done)
    opened.close()
    again = Storage.open(settings_for(store))
    assert isinstance(again.ledger.claim(KEY, REQUEST).result(), Done)
    again.close()


@pytest.mark.proves("I16")
def test_a_copy_of_a_time_within_a_crawl_is_known_for_older(store: Path) -> None:
    """The end of a crawl raises the epoch too, and so does the crawl itself now and then."""
    first = Storage.open(settings_for(store))
    epochs = [own(store)["epoch"]]
    assert first.raise_epoch().epoch == first.ledger.epoch
    epochs.append(own(store)["epoch"])
    first.close()
    epochs.append(own(store)["epoch"])
    assert epochs == sorted(set(epochs))


@pytest.mark.proves("I16")
def test_a_look_says_so_and_changes_nothing(store: Path) -> None:
    open_and_close(store)
    for epoch in (own(store)["epoch"], own(store)["epoch"] + 1):
        set_epoch(store, epoch)
        before = (store / ".streaming" / "store.json").read_bytes()
        standings = []
        for _ in range(2):
            look = Storage.open(settings_for(store), Use.MAINTAIN)
            standings.append(look.ledger.standing().result())
            assert look.notes == ()
            look.close()
        assert standings[0] == standings[1]
        assert standings[0].put_back_at is None
        assert (store / ".streaming" / "store.json").read_bytes() == before
    assert standings[0].unread


@pytest.mark.proves("I16")
def test_a_rebuild_that_breaks_off_leaves_the_store_unread(store: Path) -> None:
    open_and_close(store)
    rebuilt = Storage.open(settings_for(store), Use.REBUILD)
    rebuilt.close()
    opened = Storage.open(settings_for(store))
    assert (opened.ledger.standing().result().unread, opened.notes) == (True, ())  # no copy was put back
    opened.close()


@pytest.mark.proves("I16")
def test_the_epoch_in_the_store_never_goes_back(store: Path) -> None:
    """Several workers write it."""
    opened = Storage.open(settings_for(store))
    before = own(store)["epoch"]
    set_epoch(store, before + 7)
    identity.update_identity(store / ".streaming", opened.ledger.ledger_id, before, fsync=False)
    assert own(store)["epoch"] == before + 7
    opened.close()
    assert own(store)["epoch"] == before + 8


RAISING = (
    OPEN
    + """
children = []
for _ in range(8):
    child = os.fork()
    if not child:
        code = 1
        try:
            for _ in range(6):
                storage = open_store()
                code = 2 if storage.notes else 0
                storage.close()
                if code:
                    break
        finally:
            os._exit(code)
    children.append(child)
print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""
)


@pytest.mark.proves("I16", "I20")
def test_processes_that_open_and_close_at_once_raise_no_false_alarm(store: Path) -> None:
    open_and_close(store)
    done = subprocess.run(
        [sys.executable, "-c", RAISING, str(store)], env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["0"] * 8
    look = Storage.open(settings_for(store), Use.MAINTAIN)
    standing = look.ledger.standing().result()
    look.close()
    assert (standing.put_back_at, standing.unread) == (None, False)
    assert own(store)["epoch"] == standing.epoch
    assert standing.epoch > 8 * 6


def test_a_store_json_that_cannot_be_written_is_said(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_and_close(store)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(identity, "write_identity", full)
        error = refusal(store)
    assert error.reason == "store-not-writable"
    assert "store.json cannot be written: No space left" in str(error)
    open_and_close(store)
