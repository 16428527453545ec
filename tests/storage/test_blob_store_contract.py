"""What every blob store does, whatever holds its bytes: the contract of ``storage.blobs.BlobStore``."""

from __future__ import annotations

import hashlib
import inspect
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from support.memory_store import Held, MemoryStore
from support.stores import assert_whole, fetch, open_store, publish, state

from scrapy_streaming.exceptions import IntegrityError, NotAdopted, StoreError, WriteFailed
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import NotedFile, RecordedName, StoredRepresentation
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.storage import blobs as blobs_package
from scrapy_streaming.storage import maintenance
from scrapy_streaming.storage.blobs import STORES, BlobStore, Presence, Tampered, base
from scrapy_streaming.storage.blobs.local import LocalBlobStore
from scrapy_streaming.storage.blobs.named import NamesOnlyStore
from scrapy_streaming.storage.complete_part import CompletePart, small_part

STATE = PartState("https://example.org/a.bin", Validators())
DATA = random.Random(5).randbytes(200_000)
OTHER = random.Random(6).randbytes(200_000)
NAME = "full/a.bin"


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Kind:
    """A store, with what happens to it from outside."""

    blobs: BlobStore
    folder: Path
    spoil: Callable[[Digest, bytes], object]
    lose: Callable[[Digest], object]
    write: Callable[[str, bytes], object]
    quarantined: Callable[[], list[bytes]]

    def part(self, data: bytes = DATA, *, small: bool = True) -> CompletePart:
        if small:
            return small_part(STATE, data)
        path = self.folder / f"{random.randbytes(8).hex()}.part"
        path.write_bytes(data)
        return CompletePart(STATE, len(data), Digest(sha(data)), path)

    def publish(self, data: bytes = DATA) -> Digest:
        return self.blobs.publish(self.part(data)).digest


def on_disk(tmp_path: Path, kind: type[LocalBlobStore | NamesOnlyStore], **options: str) -> Kind:
    root, own = tmp_path / "store", tmp_path / "store" / ".streaming"
    for folder in (own / "parts", own / "quarantine"):
        folder.mkdir(parents=True)
    blobs = kind(root, own / "quarantine", fsync=False, **options)

    def write(name: str, data: bytes) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(data)

    def spoil(digest: Digest, data: bytes) -> None:
        blobs.path(digest).chmod(0o644)
        blobs.path(digest).write_bytes(data)

    return Kind(
        blobs,
        own / "parts",
        spoil,
        lambda digest: blobs.path(digest).unlink(),
        write,
        lambda: [path.read_bytes() for path in (own / "quarantine").iterdir()],
    )


def in_memory(tmp_path: Path) -> Kind:
    blobs = MemoryStore()
    return Kind(
        blobs,
        tmp_path,
        lambda digest, data: blobs.held.__setitem__(digest.hex, Held.new(data)),
        lambda digest: blobs.held.pop(digest.hex),
        lambda name, data: blobs.named.__setitem__(name, Held.new(data)),
        lambda: list(blobs.quarantined),
    )


KINDS: dict[str, Callable[[Path], Kind]] = {
    "local": lambda path: on_disk(path, LocalBlobStore),
    "local copies": lambda path: on_disk(path, LocalBlobStore, link_mode="copy"),
    "memory": in_memory,
}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kind]:
    made = request.param(tmp_path)
    yield made
    made.blobs.close()


@pytest.fixture
def names_only(tmp_path: Path) -> Iterator[Kind]:
    made = on_disk(tmp_path, NamesOnlyStore)
    yield made
    made.blobs.close()


def stored(data: bytes, path: str | None = None, own: bytes | None = None) -> StoredRepresentation:
    name = None if path is None else RecordedName(path, own)
    return StoredRepresentation(f"sha256:{sha(data)}", len(data), Validators(), STATE.url, name=name)


# -- publishing and reading ------------------------------------------------------------------


@pytest.mark.parametrize("small", [True, False], ids=["memory", "file"])
@pytest.mark.parametrize("data", [b"", DATA], ids=["empty", "large"])
def test_published_bytes_can_be_read_and_verified(kind: Kind, data: bytes, small: bool) -> None:
    published = kind.blobs.publish(kind.part(data, small=small))
    digest = published.digest
    assert (digest.hex, published.size, published.deduplicated) == (sha(data), len(data), False)
    with kind.blobs.open(digest) as stream:
        assert stream.read() == data
    assert kind.blobs.verify(digest)
    assert (kind.blobs.has(digest, len(data)), kind.blobs.has(digest, len(data) + 1)) == (True, False)
    assert kind.blobs.presence(digest) is Presence.BLOB
    assert digest.hex in kind.blobs.describe(digest)
    [found] = kind.blobs.blobs()
    assert (found.digest, found.size, found.name) == (digest, len(data), None)
    assert kind.blobs.find(digest) == found


def test_publishing_twice_is_once(kind: Kind) -> None:
    part = kind.part(small=False)
    first = kind.blobs.publish(part)
    for again in (part, kind.part(), kind.part(small=False)):
        published = kind.blobs.publish(again)
        assert (published.digest, published.deduplicated) == (first.digest, True)
    assert len(list(kind.blobs.blobs())) == 1
    assert kind.quarantined() == []
    assert part.path is not None
    assert part.path.exists(), "it stays until the ledger has the record"


def test_many_publishers_of_one_content_make_one_blob(kind: Kind) -> None:
    parts = [kind.part(small=number % 2 == 0) for number in range(16)]
    with ThreadPoolExecutor(8) as pool:
        digests = {published.digest for published in pool.map(kind.blobs.publish, parts)}
    assert len(digests) == len(list(kind.blobs.blobs())) == 1
    assert kind.blobs.verify(digests.pop())


def test_a_part_without_its_bytes_is_not_published(kind: Kind) -> None:
    part = kind.part(small=False)
    assert part.path is not None
    part.path.write_bytes(DATA[:-1])
    with pytest.raises(IntegrityError) as caught:
        kind.blobs.publish(part)
    assert caught.value.reason == "length-mismatch"
    part.path.unlink()
    with pytest.raises(WriteFailed):
        kind.blobs.publish(part)
    assert kind.blobs.presence(part.digest) is Presence.NOTHING


def test_a_bad_part_goes_to_quarantine(kind: Kind) -> None:
    part = kind.part(small=False)
    kind.blobs.quarantine(part)
    assert part.path is not None
    assert not part.path.exists()
    assert kind.quarantined() == [DATA]


def test_what_was_never_published_is_not_there(kind: Kind) -> None:
    digest = Digest(sha(DATA))
    assert kind.blobs.find(digest) is None
    assert not kind.blobs.has(digest, len(DATA))
    assert not kind.blobs.verify(digest)
    assert kind.blobs.inspect_blob(digest, len(DATA), None).tampered is Tampered.BLOB_MISSING
    assert kind.blobs.renew_stamp(digest, b"0" * 24) is None
    with pytest.raises(OSError, match=digest.hex):
        kind.blobs.open(digest)
    with pytest.raises(WriteFailed):
        kind.blobs.name(digest, NAME)


# -- stamps and damage -----------------------------------------------------------------------


def test_bytes_with_their_stamp_are_not_read_again(kind: Kind) -> None:
    published = kind.blobs.publish(kind.part())
    named = kind.blobs.name(published.digest, NAME, stamp=published.stamp)
    assert named.stamp is not None
    known = kind.blobs.inspect_blob(published.digest, len(DATA), named.stamp)
    assert (known.stamp, known.hashed, known.tampered) == (named.stamp, False, None)
    unknown = kind.blobs.inspect_blob(published.digest, len(DATA), None)
    assert (unknown.stamp, unknown.hashed) == (named.stamp, True)
    assert kind.blobs.renew_stamp(published.digest, named.stamp) == named.stamp


@pytest.mark.parametrize("bad", [OTHER, DATA[:-1]], ids=["other", "short"])
def test_other_bytes_in_a_blobs_place_are_seen_set_aside_and_replaced(kind: Kind, bad: bytes) -> None:
    published = kind.blobs.publish(kind.part())
    kind.spoil(published.digest, bad)
    assert not kind.blobs.verify(published.digest)
    assert kind.blobs.renew_stamp(published.digest, published.stamp) is None
    seen = kind.blobs.inspect_blob(published.digest, len(DATA), published.stamp)
    assert (seen.stamp, seen.tampered) == (None, Tampered.BAD_BLOB)
    assert seen.found is not None
    assert kind.blobs.set_aside(seen.found)
    assert kind.quarantined() == [bad]
    assert kind.blobs.presence(published.digest) is Presence.NOTHING
    assert not kind.blobs.publish(kind.part()).deduplicated
    assert not kind.blobs.set_aside(seen.found), "good bytes are there by now"
    assert kind.blobs.verify(published.digest)


def test_a_bad_blob_is_no_duplicate(kind: Kind) -> None:
    digest = kind.publish()
    kind.spoil(digest, OTHER)
    assert not kind.blobs.publish(kind.part()).deduplicated
    assert kind.blobs.verify(digest)
    assert kind.quarantined() == [OTHER]


def test_a_listed_blob_is_hashed_until_told_to_stop(kind: Kind) -> None:
    digest, stop = kind.publish(), threading.Event()
    [found] = kind.blobs.blobs()
    read = kind.blobs.hash(found, stop)
    assert read is not None
    assert (read.good, read.hexadecimal, read.found.size) == (True, digest.hex, len(DATA))
    kind.spoil(digest, OTHER)
    read = kind.blobs.hash(found, stop)
    assert read is not None
    assert (read.good, read.hexadecimal) == (False, sha(OTHER))
    stop.set()
    assert kind.blobs.hash(found, stop) is None
    kind.lose(digest)
    assert kind.blobs.hash(found, threading.Event()) is None


# -- the trash -------------------------------------------------------------------------------


def test_a_blob_goes_to_the_trash_and_comes_back(kind: Kind) -> None:
    digest = kind.publish()
    [found] = kind.blobs.blobs()
    assert kind.blobs.move_to_trash(found)
    assert kind.blobs.presence(digest) is Presence.NOTHING
    assert [blob.digest for blob in kind.blobs.trashed()] == [digest]
    assert not kind.blobs.move_to_trash(found)
    kind.blobs.restore_trashed(digest)
    assert kind.blobs.verify(digest)
    assert list(kind.blobs.trashed()) == []
    assert not kind.blobs.delete_trashed(digest)
    [found] = kind.blobs.blobs()
    assert kind.blobs.move_to_trash(found)
    assert kind.blobs.delete_trashed(digest)
    assert list(kind.blobs.trashed()) == list(kind.blobs.blobs()) == []


def test_a_blob_that_a_publisher_relies_on_is_not_taken(kind: Kind) -> None:
    digest = kind.publish()
    assert kind.blobs.verify(digest), "read once: the system notes no further reads as new"
    [found] = kind.blobs.blobs()
    assert kind.blobs.publish(kind.part()).deduplicated
    assert not kind.blobs.move_to_trash(found)
    assert kind.blobs.verify(digest)


def test_publishing_again_wins_over_the_trash(kind: Kind) -> None:
    digest = kind.publish()
    [found] = kind.blobs.blobs()
    assert kind.blobs.move_to_trash(found)
    assert not kind.blobs.publish(kind.part()).deduplicated
    kind.blobs.restore_trashed(digest)
    assert kind.blobs.verify(digest)
    assert len(list(kind.blobs.blobs())) == 1


# -- names -----------------------------------------------------------------------------------


def test_a_name_leads_to_the_bytes_and_moves_with_them(kind: Kind) -> None:
    one, two = kind.publish(DATA), kind.publish(OTHER)
    assert not kind.blobs.is_taken(NAME)
    assert kind.blobs.written_at(NAME) is None
    for digest, data in ((one, DATA), (two, OTHER), (one, DATA)):
        named = kind.blobs.name(digest, f"./{NAME}")
        assert (named.path, named.tampered, named.kept) == (NAME, None, None)
        assert kind.blobs.adopt(NAME).digest == Digest(sha(data))
    assert kind.blobs.is_taken(NAME)
    assert kind.blobs.written_at(NAME) is not None
    assert kind.blobs.verify(one)
    assert kind.blobs.verify(two)
    assert kind.quarantined() == []


@pytest.mark.parametrize("wanted", ["", "..", "../x", "a/../..", ".streaming/x", "blobs/sha256/x", "a\0b"])
def test_an_unsafe_name_is_refused(kind: Kind, wanted: str) -> None:
    digest = kind.publish()
    for call in (lambda: kind.blobs.check_name(wanted), lambda: kind.blobs.name(digest, wanted)):
        with pytest.raises(StoreError) as caught:
            call()
        assert caught.value.reason == "store-unsafe"
    assert not kind.blobs.is_taken(wanted)
    assert kind.blobs.check_name("/a//b/../c") == "a/c"


def test_other_bytes_under_a_recorded_name_are_kept(kind: Kind) -> None:
    digest = kind.publish()
    named = kind.blobs.name(digest, NAME)
    known = stored(DATA, NAME, named.own_stamp)
    assert not kind.blobs.was_replaced(known, NAME)
    kind.write(NAME, OTHER)
    assert kind.blobs.was_replaced(known, NAME)
    assert not kind.blobs.was_replaced(known, "full/b.bin")
    again = kind.blobs.name(digest, NAME, recorded=known.name)
    assert (again.tampered, again.kept is None) == (Tampered.BAD_NAME, False)
    assert kind.quarantined() == [OTHER]
    assert kind.blobs.adopt(NAME).digest == digest


def test_what_another_program_stored_becomes_a_blob(kind: Kind) -> None:
    with pytest.raises(NotAdopted) as caught:
        kind.blobs.adopt(NAME)
    assert caught.value.reason == "not-found"
    kind.write(NAME, DATA)
    with pytest.raises(NotAdopted) as caught:
        kind.blobs.adopt(NAME, checksum=sha(OTHER))
    assert caught.value.reason == "checksum-mismatch"
    found = kind.blobs.adopt(NAME, checksum=hashlib.md5(DATA).hexdigest())
    assert (found.path, found.digest.hex, found.size, found.hashed) == (NAME, sha(DATA), len(DATA), True)
    assert kind.blobs.verify(found.digest)
    noted = NotedFile(found.digest.hex, found.size, found.file_stamp)
    assert not kind.blobs.adopt(NAME, noted=noted).hashed


def test_a_name_can_get_bytes_of_its_own(kind: Kind) -> None:
    digest = kind.publish()
    kind.blobs.name(digest, NAME)
    kind.blobs.give_own(NAME)
    kind.blobs.give_own("full/b.bin", digest)
    size_of = kind.blobs.shared_sizes()
    kind.spoil(digest, OTHER)
    for name in (NAME, "full/b.bin"):
        assert size_of(name) is None
        assert kind.blobs.adopt(name).digest == digest


# -- names without blobs ---------------------------------------------------------------------


@pytest.mark.parametrize("small", [True, False], ids=["memory", "file"])
def test_without_blobs_bytes_are_stored_when_they_get_their_name(names_only: Kind, small: bool) -> None:
    blobs, part = names_only.blobs, names_only.part(small=small)
    published = blobs.publish(part)
    assert (blobs.keeps_blobs, blobs.makes_names, published.deduplicated) == (False, True, False)
    assert list(blobs.blobs()) == []
    with pytest.raises(StoreError) as caught:
        blobs.open(part.digest)
    assert caught.value.reason == "finalization-off"
    named = blobs.name(part.digest, NAME, stamp=published.stamp, part=part)
    with blobs.open(part.digest, NAME) as stream:
        assert stream.read() == DATA
    found = blobs.inspect(stored(DATA, NAME, named.own_stamp))
    assert (found.stamp, found.hashed) == (named.own_stamp, False)
    assert blobs.inspect(stored(DATA)).stamp is None


def test_without_blobs_other_bytes_under_a_name_are_seen_and_kept(names_only: Kind) -> None:
    blobs, part = names_only.blobs, names_only.part()
    named = blobs.name(part.digest, NAME, part=part)
    known = stored(DATA, NAME, named.own_stamp)
    assert blobs.keep_replaced(replace(known, name=None)) is None
    names_only.write(NAME, OTHER)
    found = blobs.inspect(known)
    assert (found.stamp, found.tampered) == (None, Tampered.BAD_NAME)
    assert found.tampered.of_name
    kept = blobs.keep_replaced(known)
    assert kept is not None
    assert names_only.quarantined() == [OTHER]
    assert blobs.adopt(NAME).digest == Digest(sha(OTHER)), "it stays under its name"


# -- what stands on a store ------------------------------------------------------------------


def test_maintenance_needs_no_more_than_the_contract(tmp_path: Path) -> None:
    """Jobs, verify and gc over a store that has no file at all."""
    opened = open_store(tmp_path / "store")
    memory = MemoryStore()
    store = replace(opened, blobs=memory)
    kept, orphan = fetch(store, 1, DATA), publish(store, OTHER)
    memory.held[orphan.hex] = replace(memory.held[orphan.hex], written_at=0.0)
    found = maintenance.verify(store)
    assert (found.blobs, found.good, [each.kind for each in found.findings]) == (2, 1, ["unrecorded"])
    result = maintenance.collect(store, grace=60.0)
    assert (result.counts, result.bytes) == ({"orphans": 1}, len(OTHER))
    assert_whole(store)
    memory.held[kept.hex] = Held.new(OTHER)
    [finding] = maintenance.verify(store, repair=True).findings
    assert (finding.kind, finding.repaired) == ("bad-bytes", "moved to quarantine")
    assert state(store, kept) == "quarantined"
    assert fetch(store, 1, DATA) == kept
    assert_whole(store)
    memory.held.clear()
    [finding] = maintenance.verify(store, repair=True).findings
    assert finding.kind == "missing"
    assert maintenance.health(store).status == "degraded"
    opened.close()


# -- the contract itself ---------------------------------------------------------------------


def test_every_verb_of_the_contract_says_what_it_does() -> None:
    verbs = [getattr(BlobStore, name) for name in dir(BlobStore) if not name.startswith("_")]
    assert all(inspect.getdoc(verb) for verb in verbs if callable(verb))
    assert set(blobs_package.__all__) >= {"BlobStore", "Published", "Inspection", "Named", "Adopted"}
    assert [kind.__abstractmethods__ for kind in (*STORES, MemoryStore)] == [frozenset()] * 3


def test_no_path_of_a_blob_is_in_the_contract() -> None:
    assert not {name for name in dir(BlobStore) if name in ("path", "root", "relative", "stat", "info")}
    assert "os" not in vars(base)
