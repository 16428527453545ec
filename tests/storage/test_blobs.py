"""Blobs and names, on real files: never a wrong or short file under a blob's name, nothing outside the store.

Rows are those of the design (R…, I…, E…, F…, storage rule …).
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.crawl import sha256 as sha
from support.stores import open_files

import scrapy_streaming
from scrapy_streaming.exceptions import IntegrityError, NotAdopted, StoreError, WriteFailed
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import NotedFile, RecordedName
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.storage.blobs import Named, Published, Tampered, blob_key
from scrapy_streaming.storage.blobs.local import LocalBlobStore
from scrapy_streaming.storage.blobs.paths import safe_parts
from scrapy_streaming.storage.blobs.plain import stamp_of, umask
from scrapy_streaming.storage.complete_part import CompletePart, small_part
from scrapy_streaming.storage.parts import PartStore

ROOT = Path(scrapy_streaming.__file__).parents[1]
STATE = PartState("https://example.org/a.bin", Validators())
DATA = random.Random(5).randbytes(200_000)
NAME = "full/a.bin"
LINK_MODES = ("auto", "reflink", "hardlink", "symlink", "copy", "none")


class Store:
    """A blob store, and parts for it."""

    def __init__(self, root: Path, own: Path | None = None, **options: Any) -> None:
        self.root = root
        own = own or root / ".streaming"
        self.quarantine = own / "quarantine"
        for folder in (own / "parts", self.quarantine):
            folder.mkdir(parents=True, exist_ok=True)
        root.mkdir(parents=True, exist_ok=True)
        self.parts = PartStore(own / "parts")
        self.blobs = LocalBlobStore(root, self.quarantine, **options)
        self._fence = 0

    def part(self, data: bytes = DATA) -> CompletePart:
        self._fence += 1
        writer = self.parts.create("ab" * 32, self._fence, STATE)
        writer.write(data)
        return writer.finish()

    def publish(self, data: bytes = DATA) -> Digest:
        return self.blobs.publish(small_part(STATE, data)).digest

    def close(self) -> None:
        self.parts.close()
        self.blobs.close()


Opener = Callable[..., Store]


@pytest.fixture
def make_store(tmp_path: Path) -> Iterator[Opener]:
    before = open_files()
    opened = []

    def make(*, root: Path | None = None, own: Path | None = None, **options: Any) -> Store:
        opened.append(Store(root or tmp_path / "outer" / "store", own, **options))
        return opened[-1]

    yield make
    for store in opened:
        store.close()
    assert open_files() == before


@pytest.fixture
def store(make_store: Opener) -> Store:
    return make_store()


@pytest.fixture(params=["file", "memory"])
def finished(request: pytest.FixtureRequest, store: Store) -> Callable[[bytes], CompletePart]:
    """Both kinds of complete parts."""
    if request.param == "file":
        return store.part
    return lambda data: small_part(STATE, data)


def stray(root: Path) -> list[Path]:
    """List temporary files anywhere in a store."""
    return [path for path in root.rglob("*") if path.name.endswith(".tmp")]


def untouched(now: os.stat_result, before: os.stat_result) -> bool:
    """Whether a file is the same and nothing was done to it; that somebody read it does not count."""
    return (now.st_nlink, now.st_size, stamp_of(now)) == (before.st_nlink, before.st_size, stamp_of(before))


def output_of(script: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *map(str, arguments)],
        cwd=ROOT,
        text=True,
        check=True,
        timeout=60,
        stdout=subprocess.PIPE,
    )
    return done.stdout


# -- publishing ------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"x", DATA], ids=["empty", "byte", "large"])
def test_publish_puts_the_bytes_under_their_digest(
    store: Store, finished: Callable[[bytes], CompletePart], data: bytes
) -> None:
    """Rules 1 and 11, E10."""
    published = store.blobs.publish(finished(data))
    assert (published.digest.hex, published.size, published.deduplicated) == (sha(data), len(data), False)
    path = store.root / "blobs" / "sha256" / sha(data)[:2] / sha(data)
    assert store.blobs.path(published.digest) == path
    assert path.read_bytes() == data
    assert published.stamp == stamp_of(path.stat())
    assert store.blobs.has(published.digest, len(data))
    assert not store.blobs.has(published.digest, len(data) + 1)
    assert store.blobs.verify(published.digest)
    assert stray(store.root) == []


def test_publishing_twice_is_once(store: Store, finished: Callable[[bytes], CompletePart]) -> None:
    """R66, rule 12: the same part again, and another part with the same bytes."""
    part = finished(DATA)
    first = store.blobs.publish(part)
    inode = store.blobs.path(first.digest).stat().st_ino
    for again in (part, finished(DATA)):
        assert store.blobs.publish(again).deduplicated
    assert store.blobs.path(first.digest).stat().st_ino == inode
    assert list(store.quarantine.iterdir()) == []
    assert part.path is None or part.path.exists()  # until the ledger has the record


def test_nothing_is_there_before_it_is_published(store: Store) -> None:
    digest = Digest("00" * 32)
    assert not store.blobs.has(digest, 0)
    assert not store.blobs.verify(digest)
    (store.root / "blobs").write_bytes(b"in the way")
    assert not store.blobs.has(digest, 0)
    assert not store.blobs.verify(digest)


BAD: dict[str, Callable[[Path], object]] = {
    "bit flip": lambda path: path.write_bytes(bytes([DATA[0] ^ 1]) + DATA[1:]),
    "short": lambda path: path.write_bytes(DATA[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "long": lambda path: path.write_bytes(DATA + b"x"),
    "symlink": lambda path: path.symlink_to("/etc/hostname"),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "fifo": os.mkfifo,
    "directory": Path.mkdir,
}


@pytest.mark.proves("F18", "F24")
@pytest.mark.parametrize("spoil", BAD.values(), ids=BAD.keys())
def test_bad_blob_is_replaced_and_kept_in_quarantine(
    store: Store, finished: Callable[[bytes], CompletePart], spoil: Callable[[Path], object]
) -> None:
    """R66, F18, F24: whatever stands in the blob's place; ``verify`` finds it."""
    path = store.blobs.path(Digest(sha(DATA)))
    path.parent.mkdir(parents=True)
    spoil(path)
    before = path.lstat()
    assert not store.blobs.verify(Digest(sha(DATA)))
    published = store.blobs.publish(finished(DATA))
    assert not published.deduplicated
    assert (path.read_bytes(), path.is_symlink()) == (DATA, False)
    [kept] = store.quarantine.iterdir()
    assert kept.name.startswith(f"{sha(DATA)}.")
    assert kept.lstat().st_ino == before.st_ino
    assert stray(store.root) == []


@pytest.mark.parametrize(
    "spoil", [BAD["bit flip"], BAD["symlink"], BAD["fifo"]], ids=["bit flip", "symlink", "fifo"]
)
def test_bad_blob_is_replaced_also_when_quarantine_is_on_another_disk(
    make_store: Opener, spoil: Callable[[Path], object]
) -> None:
    """R66, R68: ``STREAMING_DIR`` elsewhere."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        store = make_store(own=Path(elsewhere))
        path = store.blobs.path(Digest(sha(DATA)))
        path.parent.mkdir(parents=True)
        spoil(path)
        regular = path.is_file() and not path.is_symlink()
        store.blobs.publish(store.part())
        assert path.read_bytes() == DATA
        kept = list(store.quarantine.iterdir())
        assert len(kept) == regular
        assert all(sha(file.read_bytes()) != sha(DATA) for file in kept)


@pytest.mark.proves("I5")
def test_replacing_a_bad_blob_never_takes_a_good_one_away(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R66, I5: two publishers saw the same bad blob; the second acts after the first is done."""
    path = store.blobs.path(Digest(sha(DATA)))
    path.parent.mkdir(parents=True)
    path.write_bytes(b"bad")
    real, seen = store.blobs.verify, []

    def slow(digest: Digest) -> bool:
        verdict = real(digest)
        if not seen:
            seen.append(verdict)
            store.blobs.publish(store.part())  # the first one, in between
            monkeypatch.setattr(os, "rename", watched)
            monkeypatch.setattr(os, "link", watched_link)
        return verdict

    rename, link = os.rename, os.link

    def watched(*arguments: Any, **more: Any) -> None:
        rename(*arguments, **more)
        assert path.read_bytes() == DATA

    def watched_link(*arguments: Any, **more: Any) -> None:
        link(*arguments, **more)
        assert path.read_bytes() == DATA

    monkeypatch.setattr(store.blobs, "verify", slow)
    store.blobs.publish(store.part())
    assert seen == [False]
    assert path.read_bytes() == DATA


@pytest.mark.proves("F18")
def test_a_blob_damaged_in_its_parts_own_inode_is_not_published_as_good(store: Store) -> None:
    """F18: part and blob are one file, whose bytes changed after they were counted."""
    part = store.part()
    store.blobs.publish(part)
    assert part.path is not None
    part.path.chmod(0o600)
    part.path.write_bytes(bytes(len(DATA)))
    with pytest.raises(IntegrityError):
        store.blobs.publish(part)


@pytest.mark.proves("F10")
@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x"], ids=["short", "long"])
def test_a_file_that_is_not_as_long_as_what_was_counted_is_not_published(
    store: Store, change: Callable[[bytes], bytes]
) -> None:
    """Rule 11, F10: lying writes end here."""
    part = store.part()
    assert part.path is not None
    part.path.write_bytes(change(DATA))
    with pytest.raises(IntegrityError) as caught:
        store.blobs.publish(part)
    assert caught.value.reason == "length-mismatch"
    assert not store.blobs.path(part.digest).exists()


@pytest.mark.proves("F24")
@pytest.mark.parametrize("kind", ["fifo", "symlink", "directory", "nothing"])
def test_a_thing_in_the_parts_place_is_not_published(store: Store, tmp_path: Path, kind: str) -> None:
    """F24, E2."""
    part = store.part()
    assert part.path is not None
    (tmp_path / "target").write_bytes(DATA)
    part.path.unlink()
    if kind == "fifo":
        os.mkfifo(part.path)
    elif kind == "symlink":
        part.path.symlink_to(tmp_path / "target")
    elif kind == "directory":
        part.path.mkdir()
    with pytest.raises((WriteFailed, IntegrityError)):
        store.blobs.publish(part)
    assert not store.blobs.path(part.digest).exists()
    assert stat.S_IMODE((tmp_path / "target").stat().st_mode) != 0o444


def test_a_finished_part_has_bytes_or_a_path(store: Store) -> None:
    with pytest.raises(TypeError):
        store.blobs.publish(CompletePart(STATE, 0, Digest(sha(b""))))


def test_another_filesystem_or_no_links_means_a_checked_copy(make_store: Opener) -> None:
    """R68, EXDEV: parts on ``/dev/shm``."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        store = make_store(own=Path(elsewhere))
        assert Path(elsewhere).stat().st_dev != store.root.stat().st_dev
        part = store.part()
        assert not store.blobs.publish(part).deduplicated
        path = store.blobs.path(part.digest)
        assert (path.read_bytes(), path.stat().st_nlink) == (DATA, 1)
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask()
        assert store.blobs.publish(part).deduplicated
        changed = store.part(b"first")
        assert changed.path is not None
        changed.path.chmod(0o600)
        changed.path.write_bytes(b"other")
        with pytest.raises(IntegrityError):
            store.blobs.publish(changed)
        assert not store.blobs.path(changed.digest).exists()
        assert stray(store.root) == []


def test_a_bad_part_goes_to_quarantine(store: Store) -> None:
    """E9."""
    part = store.part()
    store.blobs.quarantine(part)
    [kept] = store.quarantine.iterdir()
    assert kept.read_bytes() == DATA
    store.blobs.quarantine(small_part(STATE, b"never on disk"))
    with pytest.raises(WriteFailed):
        store.blobs.quarantine(part)


# -- syncs -----------------------------------------------------------------------------------


class Trace:
    """What was done to the disk, in order, by paths below the store."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str]] = []
        self.fail: str | None = None
        self._root = root
        for name in ("fsync", "link", "rename", "mkdir", "fchmod"):
            monkeypatch.setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _where(self, target: int | str | Path) -> str:
        if isinstance(target, int):
            return os.path.relpath(Path(f"/proc/self/fd/{target}").readlink(), self._root)
        return Path(target).name

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            target = arguments[1] if name in ("link", "rename") else arguments[0]
            where = self._where(target)
            self.calls.append((name, where))
            if name == "fsync" and self.fail is not None and where.endswith(self.fail):
                self.fail = None
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*arguments, **more)

        return call


def test_file_then_link_then_directory_and_every_new_directory_in_its_parent(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 11, R67."""
    part = store.part()
    assert part.path is not None
    trace = Trace(store.root, monkeypatch)
    store.blobs.publish(part)
    first = sha(DATA)[:2]
    shard = f"blobs/sha256/{first}"
    file = os.path.relpath(part.path, store.root)
    made = [
        ("mkdir", "blobs"),
        ("fsync", "."),
        ("mkdir", "sha256"),
        ("fsync", "blobs"),
        ("mkdir", first),
        ("fsync", "blobs/sha256"),
    ]
    put = [("fchmod", file), ("fsync", file), ("link", sha(DATA)), ("fsync", shard)]
    assert trace.calls == made + put
    trace.calls.clear()
    assert store.blobs.publish(part).deduplicated
    again = [call for call in trace.calls if call[0] == "fsync"]
    # it may be another's, who was killed before he synced it
    assert again == [("fsync", file), ("fsync", f"{shard}/{sha(DATA)}"), ("fsync", shard)]


def test_bytes_from_memory_are_synced_before_they_get_their_name(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 11."""
    trace = Trace(store.root, monkeypatch)
    store.publish(b"abc")
    calls = [(name, Path(where).suffix or where) for name, where in trace.calls[-4:]]
    assert calls == [
        ("fchmod", ".tmp"),
        ("fsync", ".tmp"),
        ("link", sha(b"abc")),
        ("fsync", f"blobs/sha256/{sha(b'abc')[:2]}"),
    ]


def test_fsync_off_skips_the_syncs_and_nothing_else(
    make_store: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 14."""
    store = make_store(fsync=False, link_mode="copy")
    part = store.part()
    trace = Trace(store.root, monkeypatch)
    digest = store.blobs.publish(part).digest
    store.blobs.publish(part)
    store.publish(b"abc")
    store.blobs.name(digest, NAME)
    assert "fsync" not in {name for name, _ in trace.calls}
    assert {"link", "rename", "fchmod"} <= {name for name, _ in trace.calls}
    assert (store.root / NAME).read_bytes() == DATA


@pytest.mark.proves("F9")
@pytest.mark.parametrize("where", [".", "blobs/sha256", ".part", ".tmp", "shard"])
def test_a_failed_sync_publishes_nothing_and_leaks_nothing(
    store: Store, finished: Callable[[bytes], CompletePart], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """F9: reported; a descriptor that failed is not synced again, the next try has its own."""
    part = finished(DATA)
    before = open_files()
    trace = Trace(store.root, monkeypatch)
    trace.fail = f"/{sha(DATA)[:2]}" if where == "shard" else where
    if where in (".part", ".tmp") and (part.path is None) == (where == ".part"):
        return
    with pytest.raises(WriteFailed) as caught:
        store.blobs.publish(part)
    assert caught.value.reason == "sync-failed"
    assert open_files() == before
    assert stray(store.root) == []
    store.blobs.publish(part)
    assert store.blobs.verify(part.digest)


@pytest.mark.proves("F8")
def test_no_space_in_the_shard_is_said_and_leaves_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F8."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name, small in (("mkdir", False), ("link", False), ("link", True)):
        data = f"{name} {small}".encode()
        part = small_part(STATE, data) if small else store.part(data)
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(WriteFailed) as caught:
                store.blobs.publish(part)
        assert caught.value.reason == "no-space"
        assert not store.blobs.path(part.digest).exists()
        store.blobs.publish(part)
        assert store.blobs.verify(part.digest)
    assert stray(store.root) == []


def test_a_link_that_meets_a_blob_just_being_replaced_is_asked_for_again(
    make_store: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 12: the old file has no name any more at that moment, which reads as "no such file"."""
    store = make_store(link_mode="hardlink")
    digest, real, failures = store.publish(), os.link, [2, 100]

    def link(*arguments: Any, **more: Any) -> None:
        failures[0] -= 1
        if failures[0] >= 0:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        real(*arguments, **more)

    monkeypatch.setattr(os, "link", link)
    store.blobs.name(digest, NAME)
    assert (store.root / NAME).stat().st_ino == store.blobs.path(digest).stat().st_ino
    failures[0] = 100  # and in the end copied
    store.blobs.name(digest, "full/b.bin")
    assert (store.root / "full/b.bin").read_bytes() == DATA


@pytest.mark.proves("F18")
def test_a_blob_on_a_bad_sector_is_not_good(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """F18: any other fault says nothing about the blob."""
    digest = store.publish()

    def fails(number: int) -> Callable[..., Any]:
        def call(*_: object) -> Any:
            raise OSError(number, os.strerror(number))

        return call

    monkeypatch.setattr(hashlib, "file_digest", fails(errno.EIO))
    assert not store.blobs.verify(digest)
    monkeypatch.setattr(hashlib, "file_digest", fails(errno.ENOMEM))
    with pytest.raises(OSError, match="memory"):
        store.blobs.verify(digest)


# -- several at once, and killed -------------------------------------------------------------

MANY = """
import hashlib, os, random, sys, time, traceback
from pathlib import Path
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.storage.blobs.local import LocalBlobStore
from scrapy_streaming.storage.complete_part import small_part
from scrapy_streaming.storage.parts import PartStore
root = Path(sys.argv[1])
state = PartState("https://h/", Validators())

def publish(parts, blobs, who, turn, data, bad):
    if turn % 3 == 0:
        part = small_part(state, data)
    else:
        writer = parts.create("%064x" % who, turn, state)
        writer.write(data)
        part = writer.finish()
    digest = blobs.publish(part).digest
    if not bad:
        assert blobs.path(digest).read_bytes() == data
    blobs.name(digest, "full/%d" % (turn % 4))
    parts.discard("%064x" % who, turn)

def work(who, turns, bad):
    parts = PartStore(root / ".streaming/parts")
    mode = random.choice(["auto", "symlink", "copy"])
    blobs = LocalBlobStore(root, root / ".streaming/quarantine", link_mode=mode)
    for turn in range(turns):
        data = random.Random(turn % 50).randbytes(1 + 2000 * (turn % 50))
        digest = hashlib.sha256(data).hexdigest()
        path = root / "blobs/sha256" / digest[:2] / digest
        if bad and who == 0 and turn % 5 == 4 and path.exists():
            aside = path.with_name(f"bad{turn}.tmp")
            aside.write_bytes(b"bad")
            aside.rename(path)
        publish(parts, blobs, who, turn, data, bad)
"""

AT_ONCE = (
    MANY
    + """
children = []
for who in range(8):
    child = os.fork()
    if not child:
        code = 1
        try:
            work(who, 50, sys.argv[2] == "bad")
            code = 0
        except BaseException:  # printed, and told by the exit code: no fork goes on as its parent
            traceback.print_exc()
        finally:
            os._exit(code)
    children.append(child)
assert all(os.waitpid(child, 0)[1] == 0 for child in children)
"""
)

KILL = (
    MANY
    + """
import signal
mask = os.umask(0o022)
os.umask(mask)
chance = random.Random(7)
alive = 0
for turn in range(25):
    child = os.fork()
    if not child:
        random.seed(turn)
        work(turn, 100_000, False)
    time.sleep(0.03 * chance.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for path in root.glob("blobs/sha256/*/[0-9a-f]*"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name, path
        assert path.stat().st_mode & 0o777 in (0o444, 0o666 & ~mask)
        alive += 1
    for path in root.glob("full/[0-9]*"):
        assert path.is_file(), path
work(99, 50, False)
print(alive)
"""
)


def prepared(root: Path) -> Path:
    for name in ("parts", "quarantine"):
        (root / ".streaming" / name).mkdir(parents=True)
    return root


@pytest.mark.parametrize("kind", ["good", "bad"])
def test_eight_processes_publish_the_same_digests_at_once(tmp_path: Path, kind: str) -> None:
    """R66, rule 12: also while somebody spoils blobs."""
    root = prepared(tmp_path / "store")
    output_of(AT_ONCE, root, kind)
    blobs = list(root.glob("blobs/sha256/*/*"))
    if kind == "good":
        assert len(blobs) == 50
        assert all(path.name == sha(path.read_bytes()) for path in blobs)
        assert list((root / ".streaming/quarantine").iterdir()) == []
    assert list((root / ".streaming/parts").iterdir()) == []


@pytest.mark.proves("I17")
def test_kill_9_while_publishing_never_leaves_a_wrong_or_short_blob(tmp_path: Path) -> None:
    """I17, R67: 25 kills; what was cut short is published again by the next."""
    root = prepared(tmp_path / "store")
    assert int(output_of(KILL, root)) > 0
    assert len(list(root.glob("blobs/sha256/*/[0-9a-f]*"))) == 50


# -- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [mode for mode in LINK_MODES if mode != "none"])
def test_a_name_gives_the_blobs_bytes_and_making_it_again_does_nothing(make_store: Opener, mode: str) -> None:
    """Rule 13."""
    store = make_store(link_mode=mode)
    digest = store.publish()
    assert store.blobs.name(digest, NAME).path == NAME
    path = store.root / NAME
    assert path.read_bytes() == DATA
    before = path.lstat()
    for _ in range(2):
        assert store.blobs.name(digest, NAME).path == NAME
        assert untouched(path.lstat(), before)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    blob = store.blobs.path(digest).stat()
    if mode == "hardlink":
        assert before.st_ino == blob.st_ino
    elif mode == "symlink":
        assert path.readlink() == Path("..") / blob_key(digest)
    elif mode == "copy":
        assert before.st_ino != blob.st_ino
        assert before.st_mtime_ns == blob.st_mtime_ns


def test_link_mode_none_makes_no_name(make_store: Opener) -> None:
    store = make_store(link_mode="none")
    digest = store.publish()
    assert store.blobs.name(digest, "../outside").path == blob_key(digest)
    assert not (store.root / "full").exists()


def test_auto_falls_back_to_a_hard_link_where_nothing_can_be_cloned(
    make_store: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 13: reflink, else hard link, else copy."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shm:  # tmpfs has no clones
        for mode, linked in (("auto", True), ("reflink", False)):
            store = make_store(root=Path(shm) / mode, link_mode=mode)
            digest = store.publish()
            store.blobs.name(digest, NAME)
            same = (store.root / NAME).stat().st_ino == store.blobs.path(digest).stat().st_ino
            assert same is linked

        def no_links(*_: object, **__: object) -> None:
            raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))

        store = make_store(root=Path(shm) / "none", link_mode="auto")
        digest = store.publish()
        monkeypatch.setattr(os, "link", no_links)
        store.blobs.name(digest, NAME)
        copy = (store.root / NAME).lstat()
        store.blobs.name(digest, NAME)
        assert (store.root / NAME).read_bytes() == DATA
        assert untouched((store.root / NAME).lstat(), copy)
        store.close()
        store.parts = PartStore(store.quarantine)  # closed again by the fixture, before /dev/shm is cleared
        store.blobs = LocalBlobStore(store.root, store.quarantine)


def test_symbolic_names_stay_right_when_the_store_is_moved(make_store: Opener, tmp_path: Path) -> None:
    store = make_store(link_mode="symlink")
    digest = store.publish()
    names = ["top.bin", NAME, "a/b/c/d.bin"]
    for name in names:
        store.blobs.name(digest, name)
    moved = store.root.rename(tmp_path / "moved")
    for name in names:
        assert (moved / name).is_symlink()
        assert (moved / name).read_bytes() == DATA


@pytest.mark.parametrize("mode", ["auto", "hardlink", "symlink", "copy"])
def test_a_file_of_someone_else_is_replaced_atomically(make_store: Opener, mode: str) -> None:
    """Rule 13: a reader sees the old bytes or the new, never none or some."""
    store = make_store(link_mode=mode)
    digests = [store.publish(bytes([number]) * 50_000) for number in range(2)]
    path = store.root / NAME
    path.parent.mkdir()
    path.write_bytes(b"f" * 50_000)
    foreign = path.stat().st_ino
    outside = store.root.parent / "kept"
    outside.hardlink_to(path)
    allowed = {b"f" * 50_000, b"\0" * 50_000, b"\1" * 50_000}
    seen, wrong, stop = set[bytes](), [], threading.Event()

    def read() -> None:
        while not stop.is_set():
            try:
                data = path.read_bytes()
            except OSError as error:
                wrong.append(error)
                return
            seen.add(data)

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(200):
        store.blobs.name(digests[turn % 2], NAME)
    stop.set()
    reader.join()
    assert wrong == []
    assert seen <= allowed
    assert path.stat().st_ino != foreign
    assert outside.read_bytes() == b"f" * 50_000  # never truncated in place
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_new_content_moves_the_name_and_keeps_the_old_blob(store: Store) -> None:
    """S5."""
    old, new = store.publish(b"old"), store.publish(b"new")
    for digest, data in ((old, b"old"), (new, b"new"), (old, b"old")):
        store.blobs.name(digest, NAME)
        assert (store.root / NAME).read_bytes() == data
    assert store.blobs.verify(old)
    assert store.blobs.verify(new)


def test_a_name_whose_bytes_were_spoiled_is_made_again(make_store: Opener) -> None:
    for mode in ("copy", "symlink", "hardlink"):
        store = make_store(link_mode=mode)
        digest = store.publish()
        store.blobs.name(digest, NAME)
        (store.root / NAME).unlink()
        (store.root / NAME).write_bytes(b"edited")
        store.blobs.name(digest, NAME)
        assert (store.root / NAME).read_bytes() == DATA


@pytest.mark.proves("F24")
@pytest.mark.parametrize("target", ["/etc/hostname", "nowhere", "a.bin", "../full/a.bin/x"])
def test_a_link_in_the_names_place_is_replaced_never_followed(store: Store, target: str) -> None:
    """E2, F24: abroad, dangling, to itself, through a file."""
    digest = store.publish()
    (store.root / "full").mkdir()
    (store.root / NAME).symlink_to(target)
    store.blobs.name(digest, NAME)
    assert not (store.root / NAME).is_symlink()
    assert (store.root / NAME).read_bytes() == DATA
    assert not (store.root / "full" / "nowhere").exists()


def test_a_name_that_is_a_directory_is_the_users_mistake(store: Store) -> None:
    """Both orders: ``a/b`` then ``a``, and ``c`` then ``c/d``."""
    digest = store.publish()
    store.blobs.name(digest, "a/b")
    store.blobs.name(digest, "c")
    for wanted in ("a", "c/d"):
        with pytest.raises(StoreError):
            store.blobs.name(digest, wanted)
    assert (store.root / "a/b").read_bytes() == (store.root / "c").read_bytes() == DATA
    assert stray(store.root) == []


def test_a_name_for_a_blob_that_is_not_there_is_not_made(store: Store) -> None:
    with pytest.raises(WriteFailed):
        store.blobs.name(Digest("00" * 32), NAME)
    assert stray(store.root) == []
    assert not (store.root / NAME).exists()


@pytest.mark.proves("F24")
@pytest.mark.parametrize("kind", ["link", "dangling", "file", "fifo"])
@pytest.mark.parametrize("where", ["full", "blobs", "blobs/sha256", "shard"])
def test_a_planted_directory_is_refused(store: Store, tmp_path: Path, kind: str, where: str) -> None:
    """E2, F24: nothing is written through it."""
    outside = tmp_path / "outside"
    outside.mkdir()
    path = store.root / (f"blobs/sha256/{sha(DATA)[:2]}" if where == "shard" else where)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "file":
        path.write_bytes(b"")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(outside if kind == "link" else tmp_path / "nowhere")
    before = open_files()
    for _ in range(2):
        with pytest.raises(StoreError) as caught:
            store.blobs.name(store.publish(), NAME)
        assert caught.value.reason == "store-unsafe"
        assert str(path) in str(caught.value)
    assert open_files() == before
    assert list(outside.iterdir()) == []
    assert not (tmp_path / "nowhere").exists()


# -- names that leave the store --------------------------------------------------------------


def corpus() -> list[str]:
    ups = [
        "..",
        "../x",
        "a/..",
        "a/../../x",
        "./../x",
        "a/b/../../../x",
        "..//x",
        "../" * 40 + "etc/x",
    ]
    absolute = ["/", "//", "/../x", "//../x", "/blobs/sha256/x", "/.streaming/x", "/."]
    nothing = ["", ".", "./", "././", "a/..", "a/../", "/a/.."]
    null = ["\0", "a\0", "\0a", "a/\0/b", "a\0/../b", "full/a.bin\0.txt", "x" * 10 + "\0"]
    long = ["x" * 300, "a/" + "x" * 256, "x" * 256 + "/a", "é" * 128, "a/" + "日" * 86 + "/b", "x" * 5000]
    ours = [
        top + rest
        for top in ("blobs/sha256", "./blobs/.trash", ".//blobs//sha256", ".streaming", "x/../.streaming")
        for rest in (
            "",
            "/x",
            "//x",
            "/./x",
            "/sha256/ab/x",
            "/parts/x",
            "/store.json",
            "/ledger.sqlite3",
            "/a/b/c",
        )
    ]
    ours += ["blobs", "./blobs", "blobs/", "blobs/x/..", "/blobs/./sha256"]
    surrogates = ["\ud800", "a/\udfff\ud800", "full/\ud83d.bin", "\ud800/x"]
    built = [
        prefix + up + suffix
        for prefix in ("", "full/", "/full/", "./", "é/", "%2e%2e/", "../", "../../")
        for up in ("../..", "../../..", "x/../../..", "..//..", "../x/../..")
        for suffix in ("", "/x", "/etc/passwd", "/\\x")
    ]
    return list(dict.fromkeys(ups + absolute + nothing + null + long + ours + surrogates + built))


def tree(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in sorted(folder.rglob("*"))}


@pytest.mark.proves("F19")
def test_no_unsafe_name_makes_anything_anywhere(store: Store, tmp_path: Path) -> None:
    """F19, E1."""
    digest = store.publish()
    names = corpus()
    assert len(names) >= 200
    before = tree(tmp_path)
    for wanted in names:
        with pytest.raises(StoreError) as caught:
            store.blobs.name(digest, wanted)
        assert caught.value.reason == "store-unsafe"
        assert str(caught.value).isprintable()
        with pytest.raises(StoreError):
            safe_parts(wanted)
    assert tree(tmp_path) == before


@pytest.mark.proves("F19")
def test_odd_names_that_are_names_stay_inside_the_store(store: Store, tmp_path: Path) -> None:
    """F19, E1: what only looks like a way out."""
    digest = store.publish()
    outside = set(tree(tmp_path / "outer").keys()) - set(tree(store.root).keys())
    names = [
        "...", "....", "..a", "a..", "%2e%2e", "%2e%2e%2fx", "..\\x", "\\..\\x", "C:\\x", "C:", "con", "nul",
        "a b", " ", "~", "~root/x", "-rf", "$HOME", "`x`", "a\nb", "a\rb", "\x1b[2J", "\u202ex", "日本",
        "é" * 127, "x" * 255, "a//b", "./a2", "blobs2", "blobs.x", "streaming", ".streaming2", "a3/blobs/x",
        "a3/.streaming/x", "full/" + "d/" * 200 + "x", "trailing.", "x;y", "*", "?", "file:///etc/x",
        "http://h/x", "/x7", "///etc/passwd", "a4/b/../c", "d/..//x4", "t/", "t2/./", "blobs/annual.pdf",
        "blobs/sha256.pdf", "/blobs/sha2567/x", "x/../blobs/y", "a5/b/../../e",
    ]  # fmt: skip
    for wanted in names:
        inside = os.path.normpath(f"/{wanted}").lstrip("/")  # as Scrapy's own store has it (C8)
        assert store.blobs.name(digest, wanted).path == inside
        assert store.blobs.is_taken(wanted)
        made = store.root / inside
        assert made.read_bytes() == DATA
        assert made.resolve().is_relative_to(store.root.resolve())
    assert set(tree(tmp_path / "outer").keys()) - set(tree(store.root).keys()) == outside


def test_a_state_directory_inside_the_store_by_another_name_is_no_place_for_names(
    make_store: Opener, tmp_path: Path
) -> None:
    """E1: ``STREAMING_DIR`` may be anywhere."""
    root = tmp_path / "store"
    root.mkdir()
    store = make_store(root=root, own=root / "deep" / "state")
    digest = store.publish()
    for wanted in ("deep/state", "deep/state/ledger.sqlite3", "deep/./state/parts/x"):
        with pytest.raises(StoreError):
            store.blobs.name(digest, wanted)
    with pytest.raises(StoreError):  # it is a directory
        store.blobs.name(digest, "deep")
    assert store.blobs.name(digest, "deep/other").path == "deep/other"


# -- names that lead to blobs ----------------------------------------------------------------


def adopted(store: Any, path: str) -> tuple[Digest, int]:
    found = store.blobs.adopt(path)
    return found.digest, found.size


def refusal(store: Any, path: str, **how: Any) -> str:
    with pytest.raises(NotAdopted) as caught:
        store.blobs.adopt(path, **how)
    return caught.value.reason


@pytest.mark.proves("I16")
@pytest.mark.parametrize("mode", [mode for mode in LINK_MODES if mode != "none"])
def test_a_name_is_known_by_its_bytes(make_store: Opener, mode: str) -> None:
    """I16: what a lost ledger forgot is found again."""
    store = make_store(link_mode="auto" if mode == "reflink" else mode)
    digest = store.publish()
    store.blobs.name(digest, NAME)
    before = os.lstat(store.root / NAME)
    assert adopted(store, NAME) == (digest, len(DATA))
    assert os.lstat(store.root / NAME).st_ino == before.st_ino


@pytest.mark.parametrize("mode", LINK_MODES)
def test_a_file_that_another_program_stored_becomes_a_blob(make_store: Opener, mode: str) -> None:
    """C6: in ``auto`` without a copy; its time, which says when it expires, stays, and so do its bytes."""
    store = make_store(link_mode=mode)
    stray = store.root / "full" / "stray.bin"
    stray.parent.mkdir()
    stray.write_bytes(b"stray")
    os.utime(stray, (1e9, 1e9))
    permissions = stray.stat().st_mode
    found = store.blobs.adopt("full/stray.bin")
    blob = store.blobs.path(found.digest)
    assert (found.digest.hex, found.size, found.stored_at, found.hashed) == (sha(b"stray"), 5, 1e9, True)
    assert blob.read_bytes() == stray.read_bytes() == b"stray"
    assert (stray.stat().st_mtime, blob.stat().st_mtime) == (1e9, 1e9)
    assert store.blobs.inspect_blob(found.digest, 5, found.stamp).hashed is False, "the stamp is that of now"
    assert [path.name for path in store.root.rglob("*.tmp")] == []
    if mode == "auto":  # on a filesystem that clones it shares the bytes, not the file
        assert blob.samefile(stray) or store.blobs.disk.clones
        assert (stray.stat().st_mode, blob.stat().st_nlink) == (permissions, 2 - store.blobs.disk.clones)
    again = store.blobs.adopt(
        "full/stray.bin",
        noted=NotedFile(found.digest.hex, 5, stamp_of(stray.stat())),
    )
    assert (again.digest, again.hashed) == (found.digest, False)


def test_of_equal_files_the_second_stays_as_a_copy(make_store: Opener) -> None:
    """C6: so that a write to one name changes no other."""
    store = make_store(link_mode="auto")
    store.blobs.disk.clones = False
    for name in ("one", "two"):
        (store.root / name).write_bytes(DATA)
    inodes = [(store.root / name).stat().st_ino for name in ("one", "two")]
    found = [store.blobs.adopt(name) for name in ("one", "two")]
    assert [(store.root / name).stat().st_ino for name in ("one", "two")] == inodes
    assert store.blobs.path(found[0].digest).stat().st_ino == inodes[0]
    assert [each.own_stamp is None for each in found] == [True, False]
    (store.root / "two").write_bytes(b"other")
    look = store.blobs.inspect_blob(found[0].digest, len(DATA), found[1].stamp)
    assert (look.tampered, look.hashed) == (None, False)


def test_a_file_that_has_other_names_already_is_copied(make_store: Opener, tmp_path: Path) -> None:
    """A backup by ``cp -al`` must not become part of the store."""
    store = make_store(link_mode="auto")
    store.blobs.disk.clones = False
    (store.root / "mine.bin").write_bytes(DATA)
    os.link(store.root / "mine.bin", tmp_path / "backup")
    blob = store.blobs.path(store.blobs.adopt("mine.bin").digest)
    assert not blob.samefile(tmp_path / "backup")
    assert (store.root / "mine.bin").samefile(tmp_path / "backup")


def test_a_bad_blob_gives_way_to_a_file_with_the_right_bytes(make_store: Opener) -> None:
    store = make_store(link_mode="auto")
    digest = store.publish()
    store.blobs.path(digest).write_bytes(b"bad")
    (store.root / "mine.bin").write_bytes(DATA)
    assert adopted(store, "mine.bin") == (digest, len(DATA))
    assert store.blobs.verify(digest)


def test_a_name_whose_blob_is_gone_makes_it_anew(make_store: Opener) -> None:
    store = make_store()
    digest = store.publish()
    store.blobs.name(digest, NAME)
    store.blobs.path(digest).unlink()
    assert adopted(store, NAME) == (digest, len(DATA))
    assert store.blobs.verify(digest)
    assert refusal(store, "full/none") == refusal(store, "none/at/all") == "not-found"


def test_what_is_being_written_is_not_adopted(make_store: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what somebody has open to write, nor what changes while it is read or linked."""
    store = make_store()
    mine = store.root / "mine.bin"
    mine.write_bytes(DATA)
    with mine.open("r+b"):
        assert refusal(store, "mine.bin") == "being-written"
    for step in ("read", "link"):
        true = getattr(os, step)

        def written(*given: Any, true: Any = true, **how: Any) -> Any:
            with mine.open("ab") as stream:
                stream.write(b"more")
            return true(*given, **how)

        monkeypatch.setattr(os, step, written)
        assert refusal(store, "mine.bin") == "being-written"
        monkeypatch.undo()
    assert not list(store.blobs.blobs())
    assert [path.name for path in store.root.rglob("*.tmp")] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files of others")
def test_a_file_of_a_stranger_is_not_adopted(make_store: Opener) -> None:
    """E2: he could change the blob's bytes at any time. The store's owner could anyhow."""
    store = make_store(link_mode="auto")
    (store.root / "mine.bin").write_bytes(DATA)
    os.chown(store.root / "mine.bin", 65533, 65533)
    assert refusal(store, "mine.bin") == "other-owner"
    os.chown(store.root, 65533, 65533)
    assert adopted(store, "mine.bin")[1] == len(DATA)


def test_a_checksum_that_is_given_is_compared(make_store: Opener) -> None:
    store = make_store()
    (store.root / "mine.bin").write_bytes(DATA)
    for right in (hashlib.md5(DATA).hexdigest(), sha(DATA)):
        assert refusal(store, "mine.bin", checksum=right[:-1] + "x") == "checksum-mismatch"
    assert not list(store.blobs.blobs())
    assert store.blobs.adopt("mine.bin", checksum=hashlib.md5(DATA).hexdigest()).digest.hex == sha(DATA)


@pytest.mark.parametrize(
    "path", ["../store/full/a.bin", "/etc/hosts", "", "blobs/sha256", ".streaming/store.json", "full", "a\0b"]
)
def test_what_is_no_name_of_ours_is_not_adopted(make_store: Opener, path: str) -> None:
    store = make_store()
    store.blobs.name(store.publish(), NAME)
    assert refusal(store, path) in ("not-found", "not-regular")
    assert not (store.root / "none").exists()


@pytest.mark.proves("F24")
def test_a_planted_name_is_not_followed(make_store: Opener, tmp_path: Path) -> None:
    """Not out of the store, not to another name, and nobody waits for a pipe's writer."""
    store = make_store()
    digest = store.publish()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / digest.hex).write_bytes(DATA)
    (store.root / "mine.bin").write_bytes(DATA)
    (store.root / "out").symlink_to(outside / digest.hex)
    (store.root / "to-name").symlink_to("mine.bin")
    (store.root / "folder").symlink_to(outside)
    (store.root / "loop").symlink_to("loop")
    os.mkfifo(store.root / "pipe")
    for path in ("out", "to-name", f"folder/{digest.hex}", "loop", "pipe"):
        assert refusal(store, path) in ("not-found", "not-regular")
    (store.root / "in").symlink_to(store.blobs.path(digest))
    assert adopted(store, "in") == (digest, len(DATA))


# -- tampering (R77) -------------------------------------------------------------------------


def rewrite(path: Path, data: bytes) -> None:
    """Write in place, whatever the mode, and set the time of modification back, as root can."""
    info = path.stat()
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(stat.S_IMODE(info.st_mode))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def flipped(data: bytes = DATA) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def published_and_named(store: Store, name: str = NAME, data: bytes = DATA) -> tuple[Published, Named]:
    published = store.blobs.publish(small_part(STATE, data))
    return published, store.blobs.name(published.digest, name, stamp=published.stamp)


@pytest.mark.parametrize("mode", LINK_MODES)
def test_an_untouched_blob_is_not_read_and_a_touched_one_is(make_store: Opener, mode: str) -> None:
    """R77, rule 13b: the stamp is taken after the last thing that we do to the file."""
    store = make_store(link_mode="auto" if mode == "reflink" else mode)
    published, named = published_and_named(store)
    look = store.blobs.inspect_blob(published.digest, len(DATA), named.stamp)
    assert (look.stamp, look.hashed) == (named.stamp, False)
    assert store.blobs.name(published.digest, NAME, stamp=look.stamp).stamp == look.stamp
    assert store.blobs.name(published.digest, NAME).stamp is None  # nobody vouched for its bytes
    path = store.blobs.path(published.digest)
    os.utime(path)
    look = store.blobs.inspect_blob(published.digest, len(DATA), named.stamp)
    assert (look.stamp, look.hashed, look.tampered) == (stamp_of(path.stat()), True, None)
    assert store.blobs.inspect_blob(published.digest, len(DATA), None).hashed


@pytest.mark.proves("F18")
@pytest.mark.parametrize(
    "data", [flipped(), DATA[:-1], b"", DATA + b"x"], ids=["bit flip", "short", "empty", "long"]
)
def test_other_bytes_in_a_blobs_place_are_seen_whatever_their_times_say(store: Store, data: bytes) -> None:
    """R77, F18: size and time of modification can be kept, the time of change cannot."""
    published, named = published_and_named(store)
    rewrite(store.blobs.path(published.digest), data)
    look = store.blobs.inspect_blob(published.digest, len(DATA), named.stamp)
    assert (look.stamp, look.tampered) == (None, Tampered.BAD_BLOB)
    assert look.found is not None
    assert store.blobs.set_aside(look.found)
    [kept] = store.quarantine.iterdir()
    assert kept.read_bytes() == data
    assert (
        store.blobs.inspect_blob(published.digest, len(DATA), named.stamp).tampered is Tampered.BLOB_MISSING
    )
    assert store.blobs.renew_stamp(published.digest, published.stamp) is None


@pytest.mark.parametrize("kind", ["symlink", "fifo", "directory"])
def test_a_thing_in_a_blobs_place_is_no_blob(store: Store, kind: str) -> None:
    """R77, F24."""
    published, named = published_and_named(store)
    store.blobs.path(published.digest).unlink()
    BAD[kind](store.blobs.path(published.digest))
    look = store.blobs.inspect_blob(published.digest, len(DATA), named.stamp)
    assert look.tampered is Tampered.BAD_BLOB
    assert look.found is not None
    assert store.blobs.set_aside(look.found)


def test_a_blob_that_nobody_may_read_is_not_good(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """R77: root may read everything, so the refusal is given by hand."""
    published, named = published_and_named(store)
    os.utime(store.blobs.path(published.digest))

    def refuse(path: Any, *_: Any, **__: Any) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        look = store.blobs.inspect_blob(published.digest, len(DATA), named.stamp)
    assert look.tampered is Tampered.BAD_BLOB


def test_what_changes_while_it_is_judged_is_not_set_aside(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R77: another worker may just have put good bytes there."""
    published, named = published_and_named(store)
    path = store.blobs.path(published.digest)
    rewrite(path, flipped())
    real = hashlib.file_digest

    def replaced(*arguments: Any) -> Any:
        digest = real(*arguments)
        path.unlink()
        path.write_bytes(DATA)
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", replaced)
        look = store.blobs.inspect_blob(published.digest, len(DATA), named.stamp)
    assert (look.tampered, look.found) == (Tampered.BAD_BLOB, None)


def test_a_write_right_after_publishing_is_seen(store: Store) -> None:
    """R77: within the kernel's tick both its times would be the same."""
    for number in range(50):
        data = DATA[:1000] + bytes([number])
        published, named = published_and_named(store, f"full/{number}", data)
        with (store.root / f"full/{number}").open("r+b") as stream:
            stream.write(bytes([data[0] ^ 1]))
        look = store.blobs.inspect_blob(published.digest, len(data), named.stamp)
        assert look.tampered is Tampered.BAD_BLOB
        assert store.blobs.renew_stamp(published.digest, published.stamp) is None


@pytest.mark.parametrize("small", [True, False], ids=["memory", "part"])
def test_in_auto_the_first_name_is_a_link_and_each_further_one_a_copy(store: Store, small: bool) -> None:
    """Rule 13: a write to one name never changes another name's bytes."""
    part = small_part(STATE, DATA) if small else store.part()
    published = store.blobs.publish(part)
    digest, names = published.digest, ["full/a", "full/b", "full/c"]
    for name in names:
        named = store.blobs.name(digest, name, stamp=published.stamp, part=part)
        assert (named.own_stamp is None) is (name == "full/a")
    if part.path is not None:
        part.path.unlink()
    assert store.blobs.path(digest).stat().st_nlink == 2
    for name in names:
        (store.root / name).write_bytes(b"edited " + name.encode())  # as stock does
        others = [other for other in names if other > name]
        assert all((store.root / other).read_bytes() == DATA for other in others)
    assert (store.root / "full/a").read_bytes() == b"edited full/a"


def test_in_auto_names_that_shared_a_file_come_apart(make_store: Opener) -> None:
    """Rule 13: a store that was filled with hard links."""
    store = make_store(link_mode="hardlink")
    digest = store.publish()
    names = [store.root / store.blobs.name(digest, name).path for name in ("full/a", "full/b", "full/c")]
    assert {path.stat().st_nlink for path in names} == {4}
    store = make_store(link_mode="auto")
    assert not names[0].stat().st_mode & stat.S_IWUSR
    for path in names:
        store.blobs.name(digest, str(path.relative_to(store.root)))
    assert len({path.stat().st_ino for path in names}) == 3
    assert all(path.stat().st_mode & stat.S_IWUSR for path in names)
    assert store.blobs.path(digest).stat().st_nlink == 2


@pytest.mark.parametrize(("mode", "wanted"), [("auto", 0o640), ("copy", 0o444), ("hardlink", 0o444)])
def test_files_have_the_permissions_of_the_users_umask(make_store: Opener, mode: str, wanted: int) -> None:
    """Rule 13, E10: names as stock's; blobs that no name shares, or all names do, are read-only."""
    mask = os.umask(0o027)
    try:
        store = make_store(link_mode=mode)
        for part in (small_part(STATE, b"small"), store.part()):
            digest = store.blobs.publish(part).digest
            assert stat.S_IMODE(store.blobs.path(digest).stat().st_mode) == wanted
            for name in ("full/a", "full/b"):
                store.blobs.name(digest, name, part=part)
                expected = 0o444 if mode == "hardlink" else 0o640
                assert stat.S_IMODE((store.root / name).stat().st_mode) == expected
    finally:
        os.umask(mask)


def replace_by(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


NAME_SPOILED: dict[str, Callable[[Path], object]] = {
    "bit flip": lambda path: rewrite(path, flipped()),
    "short": lambda path: rewrite(path, DATA[:-1]),
    "empty": lambda path: rewrite(path, b""),
    "other file": lambda path: replace_by(path, flipped()),
}


@pytest.mark.parametrize("spoil", NAME_SPOILED.values(), ids=NAME_SPOILED.keys())
@pytest.mark.parametrize("elsewhere", [False, True], ids=["", "other disk"])
def test_other_bytes_under_a_copy_are_kept_and_the_name_is_made_again(
    make_store: Opener, spoil: Callable[[Path], object], elsewhere: bool
) -> None:
    """R77: its stamp tells, not its size nor its time of modification."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shm:
        store = make_store(link_mode="copy", own=Path(shm) if elsewhere else None)
        published, named = published_and_named(store)
        recorded = RecordedName(NAME, named.own_stamp)
        again = store.blobs.name(published.digest, NAME, recorded=recorded)
        assert (again.own_stamp, again.hashed, again.tampered) == (named.own_stamp, False, None)
        spoil(store.root / NAME)
        spoiled = (store.root / NAME).read_bytes()
        again = store.blobs.name(published.digest, NAME, recorded=recorded)
        assert again.tampered is Tampered.BAD_NAME
        assert (store.root / NAME).read_bytes() == DATA
        assert again.own_stamp == stamp_of((store.root / NAME).stat())
        assert again.kept is not None
        assert Path(again.kept).read_bytes() == spoiled
        assert list(store.quarantine.iterdir()) == [Path(again.kept)]
        (store.root / NAME).unlink()
        again = store.blobs.name(published.digest, NAME, recorded=RecordedName(NAME, again.own_stamp))
        assert (again.tampered, again.kept) == (Tampered.NAME_MISSING, None)
        for part in store.root.rglob("*.tmp"):
            pytest.fail(str(part))


@pytest.mark.parametrize("kind", ["symlink", "dangling", "fifo"])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["", "other disk"])
def test_a_thing_in_a_names_place_is_said_and_replaced(
    make_store: Opener, kind: str, elsewhere: bool
) -> None:
    """R77, F24: nothing is read through it."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shm:
        store = make_store(own=Path(shm) if elsewhere else None)
        published, named = published_and_named(store)
        (store.root / NAME).unlink()
        BAD[kind](store.root / NAME)
        again = store.blobs.name(published.digest, NAME, recorded=RecordedName(NAME, named.own_stamp))
        assert (again.tampered, again.hashed) == (Tampered.BAD_NAME, False)
        assert (store.root / NAME).read_bytes() == DATA


def test_a_name_that_has_another_blobs_bytes_is_moved_silently(make_store: Opener) -> None:
    """R77: two jobs of one name, or an older generation: nobody tampered, and nothing is lost."""
    store = make_store(link_mode="copy")
    one, named = published_and_named(store)
    two = store.publish(flipped())
    store.blobs.name(two, NAME)
    again = store.blobs.name(one.digest, NAME, recorded=RecordedName(NAME, named.own_stamp))
    assert (again.tampered, again.hashed) == (None, True)
    assert (store.root / NAME).read_bytes() == DATA
    assert list(store.quarantine.iterdir()) == []


def test_a_copy_with_the_right_bytes_becomes_the_link_that_a_new_blob_lacks(store: Store) -> None:
    """Rule 13: a store needs no more disk than stock's."""
    published_and_named(store)
    store.blobs.path(Digest(sha(DATA))).unlink()
    published, named = published_and_named(store)
    assert named.hashed
    assert (store.root / NAME).samefile(store.blobs.path(published.digest))
    assert store.blobs.inspect_blob(published.digest, len(DATA), named.stamp).hashed is False


# -- beside gc -------------------------------------------------------------------------------


@pytest.mark.proves("F26")
def test_a_blob_that_is_taken_away_while_it_is_judged_is_published_again(
    make_store: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F26: whoever looked at it before it went is not told that it is there."""
    store = make_store()
    digest = store.publish()
    real, taken = LocalBlobStore.verify, []

    def taking(self: LocalBlobStore, wanted: Digest) -> bool:
        good = real(self, wanted)
        if not taken:
            [found] = store.blobs.blobs()
            assert store.blobs.take(found, store.quarantine / "taken")
            taken.append(found)
        return good

    monkeypatch.setattr(LocalBlobStore, "verify", taking)
    published = store.blobs.publish(store.part())
    assert (published.digest, published.deduplicated) == (digest, False)
    assert store.blobs.verify(digest)


@pytest.mark.proves("F26")
def test_a_name_is_made_while_gc_looks_at_the_blob(
    make_store: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F26: it is away for a moment, and whoever vouched for it goes on."""
    store = make_store()
    digest = store.publish()
    [found] = store.blobs.blobs()
    naming = threading.Thread(target=store.blobs.name, args=(digest, NAME))
    answers = iter([True, False])

    def same(self: Any, now: os.stat_result) -> bool:
        good = next(answers)
        if not good:
            naming.start()
            naming.join(0.03)
        return good

    monkeypatch.setattr(type(found), "same", same)
    assert not store.blobs.take(found, store.quarantine / "taken")
    naming.join()
    assert (store.root / NAME).read_bytes() == DATA


@pytest.mark.proves("F26")
def test_a_blob_that_somebody_vouched_for_is_not_taken(make_store: Opener) -> None:
    """F26: its copies still know it."""
    store = make_store(link_mode="copy")
    store.blobs.name(store.publish(), NAME)
    [found] = store.blobs.blobs()
    assert store.blobs.publish(store.part()).deduplicated
    assert not store.blobs.take(found, store.quarantine / "taken")
    [now] = store.blobs.blobs()
    assert not found.same(now.info)
    assert now.info.st_mtime_ns == found.info.st_mtime_ns
    assert store.blobs.take(now, store.quarantine / "taken")
    store.blobs.put_back(now.digest, store.quarantine / "taken")
    assert store.blobs.verify(now.digest)
    assert list(store.quarantine.iterdir()) == []
