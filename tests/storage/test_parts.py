"""Parts, on real files: what a killed, cheated or overtaken writer leaves is a right prefix or found out.

Rows are those of the design (R…, I…, E…, F…, storage rule …).
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import random
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.crawl import sha256 as sha

import scrapy_streaming
from scrapy_streaming.exceptions import IntegrityError, PartCorrupt, WriteFailed
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.fields import EntityTag
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.storage import durable
from scrapy_streaming.storage import parts as parts_module
from scrapy_streaming.storage.complete_part import small_part
from scrapy_streaming.storage.part_writer import PartWriter
from scrapy_streaming.storage.parts import PartStore
from scrapy_streaming.storage.sidecar import PartName, StoredPart

ROOT = Path(scrapy_streaming.__file__).parents[1]
pytestmark = pytest.mark.usefixtures("no_descriptor_is_leaked")

KEY = "ab" * 32
OTHER = "cd" * 32
DATA = random.Random(1).randbytes(300_000)
HALF = 150_000
TAGGED = Validators(EntityTag("v1"), "Mon, 01 Jan 2024 00:00:00 GMT", "Tue, 02 Jan 2024 00:00:00 GMT")
STATE = PartState(
    "https://example.org/a.bin",
    TAGGED,
    total=len(DATA),
    vary=("accept",),
    selecting="sel",
    repr_digest=Digest("12" * 32),
    ranges_refused=False,
    media_type="text/plain",
)


@pytest.fixture
def folder(no_descriptor_is_leaked: None, tmp_path: Path) -> Path:
    path = tmp_path / "parts"
    path.mkdir()
    return path


@pytest.fixture
def parts(folder: Path) -> Iterator[PartStore]:
    store = PartStore(folder)
    yield store
    store.close()


def left(parts: PartStore, data: bytes = DATA[:HALF], *, fence: int = 1, key: str = KEY) -> StoredPart:
    """Leave a part with *data*, as a broken download does."""
    writer = parts.create(key, fence, STATE)
    writer.write(data)
    assert writer.close() == len(data)
    return next(stored for stored in parts.find(key) if stored.name == writer.name)


def go_on(writer: PartWriter, data: bytes = DATA) -> None:
    """Write the rest; the digest and the file's bytes must be those of an uninterrupted download."""
    writer.write(data[writer.length :])
    part = writer.finish()
    assert part.digest.hex == sha(data)
    assert part.length == len(data)
    assert part.path is not None
    assert part.path.read_bytes() == data


def edit(folder: Path, stored: StoredPart, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / stored.name.sidecar
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def process(script: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", script, *map(str, arguments)],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        **options,
    )


def output_of(script: str, *arguments: object) -> str:
    with process(script, *arguments) as running:
        out, _ = running.communicate(timeout=60)
    assert running.returncode == 0
    return out


class Trace:
    """What was done to the disk, in order: (what, file name)."""

    WATCHED = ("write", "fsync", "fdatasync", "rename", "unlink")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str]] = []
        self.descriptors: list[tuple[str, int]] = []
        for name in self.WATCHED:
            monkeypatch.setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *arguments: Any, **keywords: Any) -> Any:
            if isinstance(target, int):
                self.descriptors.append((name, target))
                self.calls.append((name, Path(f"/proc/self/fd/{target}").readlink().name))
            else:
                self.calls.append((name, Path(target).name))
            return real(target, *arguments, **keywords)

        return call


# -- the order of writes ---------------------------------------------------------------------


def test_sidecar_is_durable_before_the_first_byte_and_vouches_only_for_synced_bytes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rules 4 and 5: sidecar, its name, bytes, fdatasync, and only then the next sidecar."""
    parts = PartStore(folder, checkpoint_bytes=100)
    trace = Trace(monkeypatch)
    writer = parts.create(KEY, 1, STATE)
    name = writer.name
    begun = [
        ("write", name.temporary),
        ("fsync", name.temporary),
        ("rename", name.temporary),
        ("fsync", "parts"),
    ]
    again = [("fdatasync", name.part), *begun[:3]]
    assert trace.calls == begun
    writer.write(b"x" * 60)
    assert trace.calls == [*begun, ("write", name.part)]
    writer.write(b"x" * 60)
    assert trace.calls == [*begun, *[("write", name.part)] * 2, *again]
    assert parts.find(KEY)[0].state.length == 120
    writer.write(b"x" * 5)
    writer.close()
    assert trace.calls[-5:] == [("write", name.part), *again]
    parts.close()


def test_what_is_not_checkpointed_is_not_vouched_for(parts: PartStore) -> None:
    """Rule 5."""
    writer = parts.create(KEY, 1, STATE)
    writer.write(DATA[:1000])
    assert parts.find(KEY)[0].state.length == 0
    writer.checkpoint()
    writer.write(DATA[1000:3000])
    found = parts.find(KEY)[0].state
    assert (found.length, found.prefix_sha256) == (1000, sha(DATA[:1000]))
    writer.close()


def test_a_checkpoint_is_due_after_some_seconds_too(folder: Path) -> None:
    """Rule 5."""
    parts = PartStore(folder, checkpoint_seconds=0.0)
    writer = parts.create(KEY, 1, STATE)
    writer.write(b"x")
    assert parts.find(KEY)[0].state.length == 1
    writer.close()
    parts.close()


def test_fsync_off_skips_the_syncs_and_nothing_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule 14: order and atomicity stay."""
    parts = PartStore(folder, fsync=False)
    trace = Trace(monkeypatch)
    go_on(parts.create(KEY, 1, STATE))
    part, temporary = PartName(KEY, 1, 0).part, PartName(KEY, 1, 0).temporary
    sidecar = [("write", temporary), ("rename", temporary)]
    assert trace.calls == [*sidecar, ("write", part), *sidecar]
    parts.close()


def test_a_sidecar_says_all_it_was_told_and_only_its_owner_may_read_it(
    parts: PartStore, folder: Path
) -> None:
    """Rule 4, E10."""
    stored = left(parts)
    expected = dataclasses.replace(STATE, length=HALF, prefix_sha256=sha(DATA[:HALF]))
    assert stored.state == expected
    assert sorted(entry.name for entry in folder.iterdir()) == [stored.name.sidecar, stored.name.part]
    for entry in folder.iterdir():
        assert stat.S_IMODE(entry.stat().st_mode) == 0o600


# -- resuming --------------------------------------------------------------------------------


@pytest.mark.proves("I10")
@pytest.mark.parametrize("length", [0, 1, HALF, len(DATA) - 1])
@pytest.mark.parametrize("adopt", [True, False], ids=["rename", "copy"])
def test_resume_gives_the_digest_of_an_uninterrupted_download(folder: Path, length: int, adopt: bool) -> None:
    """Rule 6, I10."""
    parts = PartStore(folder, adopt=adopt)
    stored = left(parts, DATA[:length])
    writer = parts.reopen(stored, 2)
    assert (writer.length, writer.kept, writer.name.fence) == (length, length, 2)
    go_on(writer)
    parts.close()


def test_takeover_renames_when_the_writer_is_gone(parts: PartStore, folder: Path) -> None:
    """Rule 7."""
    stored = left(parts)
    inode = (folder / stored.name.part).stat().st_ino
    writer = parts.reopen(stored, 5)
    assert writer.path.stat().st_ino == inode
    assert {entry.name for entry in folder.iterdir()} == {writer.name.part, writer.name.sidecar}
    assert [found.name for found in parts.find(KEY)] == [writer.name]
    go_on(writer)


def test_the_same_claim_goes_on_with_its_own_part(parts: PartStore) -> None:
    stored = left(parts)
    writer = parts.reopen(stored, 1)
    assert writer.name == stored.name
    go_on(writer)


@pytest.mark.proves("F17")
@pytest.mark.parametrize("tail", [b"x", b"\0" * 70_000, DATA[HALF:]], ids=["byte", "zeros", "real"])
@pytest.mark.parametrize("adopt", [True, False], ids=["rename", "copy"])
def test_longer_file_is_cut_to_what_the_sidecar_vouches_for(folder: Path, tail: bytes, adopt: bool) -> None:
    """R2, F17 grown: ``st_size`` is never trusted."""
    parts = PartStore(folder, adopt=adopt)
    stored = left(parts)
    with (folder / stored.name.part).open("ab") as stream:
        stream.write(tail)
    writer = parts.reopen(stored, 2)
    assert (writer.length, writer.path.stat().st_size) == (HALF, HALF)
    go_on(writer)
    parts.close()


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "shorter":
        del data[-1:]
    elif how == "empty":
        data.clear()
    elif how == "first bit":
        data[0] ^= 1
    elif how == "last bit":
        data[-1] ^= 0x80
    elif how == "zero tail":
        data[-4096:] = bytes(4096)
    path.write_bytes(data)


DAMAGE = ["shorter", "empty", "first bit", "last bit", "zero tail"]


@pytest.mark.proves("F17", "I10")
@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("adopt", [True, False], ids=["rename", "copy"])
def test_damaged_prefix_is_found_and_left_for_the_caller(folder: Path, how: str, adopt: bool) -> None:
    """R3, F17, I10."""
    parts = PartStore(folder, adopt=adopt)
    stored = left(parts)
    damage(folder / stored.name.part, how)
    before = (folder / stored.name.part).read_bytes()
    with pytest.raises(PartCorrupt) as caught:
        parts.reopen(stored, 2)
    assert caught.value.reason == "corrupt-part"
    assert (folder / stored.name.part).read_bytes() == before
    assert {entry.name for entry in folder.iterdir()} == {stored.name.part, stored.name.sidecar}
    parts.close()


@pytest.mark.proves("F17")
@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_whole_part_is_never_published(parts: PartStore, folder: Path, how: str) -> None:
    """R3, R7, F17."""
    stored = left(parts, DATA)
    assert stored.state.whole
    part = parts.complete_part(stored)
    assert (part.digest.hex, part.length, part.data) == (sha(DATA), len(DATA), None)
    damage(folder / stored.name.part, how)
    with pytest.raises(PartCorrupt):
        parts.complete_part(stored)


def never_wrong(parts: PartStore, stored: StoredPart) -> None:
    """Resume and finish: corruption is found, or the bytes are the right ones."""
    try:
        writer = parts.reopen(stored, 2)
    except PartCorrupt:
        return
    writer.write(DATA[writer.length :])
    part = writer.finish()
    assert part.path is not None
    assert part.digest.hex == sha(part.path.read_bytes()) == sha(DATA)


def flipped(parts: PartStore, folder: Path) -> StoredPart:
    stored = left(parts)
    damage(folder / stored.name.part, "first bit")
    return stored


@pytest.mark.proves("I10")
def test_a_flipped_bit_in_the_prefix_never_reaches_a_finished_part(parts: PartStore, folder: Path) -> None:
    """I10, R3; its mutant follows."""
    never_wrong(parts, flipped(parts, folder))


def test_mutant_without_the_prefix_hash_is_found(
    parts: PartStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S9: with the comparison taken out, the test above fails."""

    def unchecked(fd: int, stored: StoredPart) -> Any:
        return hashlib.sha256(os.pread(fd, stored.state.length, 0))

    stored = flipped(parts, folder)
    monkeypatch.setattr(parts_module, "hash_prefix", unchecked)
    with pytest.raises(AssertionError):
        never_wrong(parts, stored)


def test_an_unreadable_sector_is_a_corrupt_part(parts: PartStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """R3: EIO on reading."""
    stored = left(parts)

    def fails(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fails)
        with pytest.raises(PartCorrupt):
            parts.reopen(stored, 2)
    go_on(parts.reopen(stored, 2))


def test_being_out_of_descriptors_says_nothing_about_a_part(
    parts: PartStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A corrupt part is thrown away: a good one must not pass for one."""
    stored = left(parts)

    def fails(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fails)
        for call in (
            lambda: parts.find(KEY),
            lambda: parts.reopen(stored, 2),
            lambda: parts.complete_part(stored),
            lambda: parts.create(KEY, 2, STATE),
        ):
            with pytest.raises(WriteFailed):
                call()
    go_on(parts.reopen(stored, 2))


# -- sidecars --------------------------------------------------------------------------------

ODD: dict[str, Callable[[dict[str, Any]], object]] = {
    "newer format": lambda d: d.update(format=2),
    "no format": lambda d: d.pop("format"),
    "another job's": lambda d: d.update(job_key=OTHER),
    "another claim's": lambda d: d.update(fence=7),
    "no length": lambda d: d.pop("length"),
    "negative length": lambda d: d.update(length=-1, prefix_sha256=sha(b"")),
    "fraction": lambda d: d.update(length=1.5),
    "infinite": lambda d: d.update(length=float("inf")),
    "length is a flag": lambda d: d.update(length=True),
    "more than all": lambda d: d.update(total=HALF - 1),
    "total is a text": lambda d: d.update(total="300000"),
    "short hash": lambda d: d.update(prefix_sha256="ab"),
    "hash is a number": lambda d: d.update(prefix_sha256=5),
    "url is none": lambda d: d.update(url=None),
    "odd tag": lambda d: d.update(etag="v1"),
    "tag is a number": lambda d: d.update(etag=5),
    "date with a line break": lambda d: d.update(last_modified="Mon\r\nX: y"),
    "vary is a text": lambda d: d.update(vary="accept"),
    "vary of numbers": lambda d: d.update(vary=[1]),
    "odd digest": lambda d: d.update(repr_digest="md5:00"),
    "flag is a number": lambda d: d.update(ranges_refused=0),
}


@pytest.mark.proves("F22")
@pytest.mark.parametrize("change", ODD.values(), ids=ODD.keys())
def test_foreign_newer_or_senseless_sidecar_vouches_for_nothing(
    parts: PartStore, folder: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    """R4, F22."""
    stored = left(parts)
    edit(folder, stored, change)
    assert parts.find(KEY) == []
    go_on(parts.create(KEY, 2, STATE))  # and nothing of it is in the way


@pytest.mark.proves("F17")
@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"5", b"\xff\xfe", b"[" * 100_000, b'{"format": 1}', b" " * (2 << 20)],
    ids=["empty", "torn", "list", "null", "number", "no text", "deep", "little", "huge"],
)
def test_damaged_sidecar_vouches_for_nothing(parts: PartStore, folder: Path, text: bytes) -> None:
    """R4, F17."""
    stored = left(parts)
    (folder / stored.name.sidecar).write_bytes(text)
    assert parts.find(KEY) == []
    parts.discard(KEY, 1)
    assert list(folder.iterdir()) == []


def test_every_cut_of_a_sidecar_vouches_for_nothing(parts: PartStore, folder: Path) -> None:
    """R4."""
    stored = left(parts)
    text = (folder / stored.name.sidecar).read_bytes()
    for length in range(len(text)):
        (folder / stored.name.sidecar).write_bytes(text[:length])
        assert parts.find(KEY) == []


@pytest.mark.proves("F10")
def test_short_writes_make_neither_a_torn_sidecar_nor_a_torn_part(
    parts: PartStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F10: ``write`` may take less than it was given."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[: max(1, len(data) // 2)]))
    writer = parts.create(KEY, 1, STATE)
    writer.write(bytearray(DATA[:1000]))
    writer.close()
    stored = parts.find(KEY)[0]
    assert stored.state.length == 1000
    go_on(parts.reopen(stored, 2))


@pytest.mark.proves("F10")
def test_a_disk_that_takes_nothing_ends_the_part(parts: PartStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """F10: a lying ``write`` that says 0 is no endless loop."""
    writer = parts.create(KEY, 1, STATE)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda *_: 0)
        with pytest.raises(WriteFailed):
            writer.write(b"x")
    assert writer.close() == 0


@pytest.mark.proves("F10")
def test_a_lying_write_is_found_when_the_part_is_resumed(
    parts: PartStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F10, R3: the disk says it took all, and took half."""
    real = os.write

    def lies(fd: int, data: memoryview) -> int:
        if stat.S_ISREG(os.fstat(fd).st_mode) and len(data) == HALF:
            real(fd, data[: HALF // 2])
            return HALF
        return real(fd, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lies)
        stored = left(parts)
    with pytest.raises(PartCorrupt):
        parts.reopen(stored, 2)


# -- what the writer refuses -----------------------------------------------------------------


def test_more_bytes_than_declared_are_refused(parts: PartStore) -> None:
    """R35: by the declared total, and by a limit below it."""
    writer = parts.create(KEY, 1, dataclasses.replace(STATE, total=10))
    writer.write(b"x" * 10)
    with pytest.raises(IntegrityError) as caught:
        writer.write(b"x")
    assert caught.value.reason == "length-mismatch"
    assert writer.close() == 10
    writer = parts.create(KEY, 2, STATE)
    writer.limit = 4
    with pytest.raises(IntegrityError):
        writer.write(b"x" * 5)
    writer.write(b"x" * 4)
    assert writer.close() == 4


def test_what_a_new_response_says_is_durable_at_the_next_checkpoint(parts: PartStore) -> None:
    writer = parts.create(KEY, 1, dataclasses.replace(STATE, total=None))
    writer.write(DATA[:10])
    writer.checkpoint()
    writer.describe(dataclasses.replace(STATE, length=999, prefix_sha256="00" * 32))
    assert writer.limit == len(DATA)
    assert parts.find(KEY)[0].state.total is None
    writer.write(DATA[10:20])
    writer.close()
    state = parts.find(KEY)[0].state
    assert (state.total, state.length, state.prefix_sha256) == (len(DATA), 20, sha(DATA[:20]))


def test_a_small_part_needs_no_file(folder: Path) -> None:
    part = small_part(dataclasses.replace(STATE, total=None), b"abc")
    assert (part.digest.hex, part.length, part.data, part.path) == (sha(b"abc"), 3, b"abc", None)
    assert (part.state.length, part.state.total) == (3, 3)


def test_closing_twice_closes_nothing_else(parts: PartStore, folder: Path) -> None:
    """A descriptor's number is soon another file's."""
    writer = parts.create(KEY, 1, STATE)
    writer.write(DATA)
    writer.finish()
    other = os.open(folder, os.O_RDONLY)
    assert writer.close() == len(DATA)
    writer.abandon()
    os.fstat(other)
    os.close(other)
    with pytest.raises((WriteFailed, IntegrityError)):
        writer.write(b"x")


# -- the disk fails --------------------------------------------------------------------------


class Failing:
    """A sync that fails once, on the file chosen, and notes every descriptor it was asked for."""

    def __init__(self, real: Callable[[int], None], suffix: str, number: int = errno.EIO) -> None:
        self.real, self.suffix, self.number = real, suffix, number
        self.failed: list[int] = []
        self.asked: list[int] = []

    def __call__(self, fd: int) -> None:
        self.asked.append(fd)
        if not self.failed and str(Path(f"/proc/self/fd/{fd}").readlink()).endswith(self.suffix):
            self.failed.append(fd)
            raise OSError(self.number, os.strerror(self.number))
        self.real(fd)


@pytest.mark.proves("F9")
def test_a_failed_fdatasync_is_final_for_that_descriptor(
    parts: PartStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 10, F9: the last checkpoint is what is found, and nothing syncs or writes there again."""
    writer = parts.create(KEY, 1, STATE)
    writer.write(DATA[:1000])
    writer.checkpoint()
    writer.write(DATA[1000:5000])
    failing = Failing(os.fdatasync, ".part")
    monkeypatch.setattr(os, "fdatasync", failing)
    with pytest.raises(WriteFailed) as caught:
        writer.checkpoint()
    assert caught.value.reason == "sync-failed"
    trace = Trace(monkeypatch)
    for again in (writer.checkpoint, lambda: writer.write(b"x")):
        with pytest.raises(WriteFailed):
            again()
    assert writer.close() == 1000
    assert trace.calls == []
    assert failing.asked == failing.failed
    stored = parts.find(KEY)[0]
    assert (stored.state.length, stored.state.prefix_sha256) == (1000, sha(DATA[:1000]))
    go_on(parts.reopen(stored, 2))


@pytest.mark.proves("F9")
def test_finish_that_fails_leaves_no_descriptor_and_no_lock(
    parts: PartStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F9: a part that could not be finished can be adopted at once."""
    writer = parts.create(KEY, 1, STATE)
    writer.write(DATA[:1000])
    writer.checkpoint()
    writer.write(DATA[1000:])
    monkeypatch.setattr(os, "fdatasync", Failing(os.fdatasync, ".part"))
    with pytest.raises(WriteFailed):
        writer.finish()
    assert writer.close() == 1000
    inode = writer.path.stat().st_ino
    again = parts.reopen(parts.find(KEY)[0], 2)
    assert (again.length, again.path.stat().st_ino) == (1000, inode)
    go_on(again)


@pytest.mark.proves("F8", "F9")
@pytest.mark.parametrize("suffix", [".json.tmp", "/parts"])
@pytest.mark.parametrize(
    ("number", "reason"), [(errno.EIO, "sync-failed"), (errno.ENOSPC, "no-space"), (errno.EDQUOT, "no-space")]
)
def test_a_part_that_cannot_begin_durably_leaves_nothing(
    parts: PartStore, folder: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, number: int, reason: str
) -> None:
    """F8, F9: no file, no descriptor; and the directory's own descriptor is not synced again."""
    failing = Failing(os.fsync, suffix, number)
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(WriteFailed) as caught:
        parts.create(KEY, 1, STATE)
    assert caught.value.reason == reason
    assert list(folder.iterdir()) == []
    assert parts._dir not in failing.asked
    go_on(parts.create(KEY, 1, STATE))


@pytest.mark.proves("F8", "F9")
def test_a_sidecar_that_cannot_be_written_leaves_the_last_one(
    parts: PartStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F8, F9: sidecars are replaced whole or not at all."""
    writer = parts.create(KEY, 1, STATE)
    writer.write(DATA[:1000])
    writer.checkpoint()
    writer.write(DATA[1000:2000])
    monkeypatch.setattr(os, "fsync", Failing(os.fsync, ".json.tmp"))
    with pytest.raises(WriteFailed):
        writer.checkpoint()
    assert writer.close() == 1000
    assert {entry.name for entry in folder.iterdir()} == {writer.name.part, writer.name.sidecar}
    go_on(parts.reopen(parts.find(KEY)[0], 2))


@pytest.mark.proves("F8")
def test_adoption_that_fails_leaves_the_old_part(parts: PartStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """F8: whatever step fails, one whole pair is found."""
    stored = left(parts)
    for name in ("fsync", "rename"):
        real = getattr(os, name)
        for step in range(1, 4):
            count = iter(range(1, 100))

            def fails(
                *arguments: Any, count: Any = count, step: int = step, real: Any = real, **more: Any
            ) -> Any:
                if next(count) == step:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real(*arguments, **more)

            stored = parts.find(KEY)[0]
            with monkeypatch.context() as patch:
                patch.setattr(os, name, fails)
                with suppress(WriteFailed):
                    parts.reopen(stored, stored.name.fence + 1).close()
    found = parts.find(KEY)
    assert found[0].state.length == HALF
    go_on(parts.reopen(found[0], 99))


@pytest.mark.proves("F8")
def test_a_full_device_keeps_the_part(parts: PartStore) -> None:
    """F8, rule 9: what was durable before stays resumable (``/dev/full`` in the part's place)."""
    writer = parts.create(KEY, 1, STATE)
    writer.write(DATA[:1000])
    writer.checkpoint()
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer._fd, inheritable=False)
    os.close(full)
    with pytest.raises(WriteFailed) as caught:
        writer.write(DATA[1000:])
    assert caught.value.reason == "no-space"
    assert writer.close() == 1000
    go_on(parts.reopen(parts.find(KEY)[0], 2))


@pytest.mark.proves("F8")
def test_a_full_filesystem_keeps_the_part(small_disk: Path | None, tmp_path: Path) -> None:
    """F8: a real one of 1 MiB, or (no right to mount) a limit on file size."""
    data = random.Random(2).randbytes(3 << 20)
    out = output_of(FILL, small_disk or tmp_path, len(data), "" if small_disk else 600_000)
    reason, durable = out.split()
    assert reason == ("no-space" if small_disk else "write-failed")
    assert int(durable) >= 512 << 10


FILL = """
import os, random, resource, signal, sys
from pathlib import Path
from scrapy_streaming.exceptions import WriteFailed
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.storage.parts import PartStore
where, size, limit = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
data = random.Random(2).randbytes(size)
parts = PartStore(where, checkpoint_bytes=64 << 10)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
fillers = 0
reasons = set()
writer = parts.create("ab" * 32, 1, PartState("https://h/", Validators()))
try:
    for offset in range(0, size, 16 << 10):
        writer.write(data[offset:offset + (16 << 10)])
except WriteFailed as error:
    reasons.add(error.reason)
kept = writer.close()
try:  # a full disk has no room for a second part's sidecar either, and is not left with half of one
    for fence in range(2, 400):
        parts.create("ab" * 32, fence, PartState("https://h/", Validators())).close()
        fillers += 1
except WriteFailed as error:
    reasons.add(error.reason)
for stored in parts.find("ab" * 32)[1:]:
    parts.remove(stored.name)
assert not list(where.glob("*.tmp"))
stored = parts.find("ab" * 32)[0]
assert stored.state.length == kept, (stored, kept)
again = parts.reopen(stored, 1000)
assert again.length == kept and again.path.read_bytes() == data[:kept]
again.abandon()
[reason] = reasons
print(reason, kept)
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path | None]:
    where = tmp_path / "small"
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1M", "none", str(where)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode:
        yield None
        return
    yield where
    subprocess.run(["umount", str(where)], check=True)


# -- killed writers --------------------------------------------------------------------------

KILL = """
import hashlib, os, random, signal, sys, time
from pathlib import Path
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.storage.parts import PartStore
where, rounds = Path(sys.argv[1]), int(sys.argv[2])
KEY, chance = "ab" * 32, random.Random(int(sys.argv[3]))
data = random.Random(3).randbytes(8 << 20)
state = PartState("https://h/", Validators(), total=len(data))

def open_store():
    return PartStore(where, checkpoint_bytes=64 << 10, fsync=sys.argv[4] == "sync")

def write(fence):
    parts = open_store()
    found = parts.find(KEY)
    writer = parts.reopen(found[0], fence) if found else parts.create(KEY, fence, state)
    while True:
        end = min(writer.length + chance.randrange(1, 20_000), len(data) - 1)
        writer.write(data[writer.length:end])
        time.sleep(0.0002)

resumed = 0
for fence in range(1, rounds + 1):
    child = os.fork()
    if not child:
        write(fence)
    parts, ends = open_store(), time.monotonic() + 60
    while fence % 5 == 0 and time.monotonic() < ends:  # some rounds until a checkpoint, however slow the disk
        if any(stored.state.length > resumed for stored in parts.find(KEY)):
            break
        time.sleep(0.001)
    parts.close()
    time.sleep(chance.choice([0.002, 0.01, 0.03]) * chance.random() * 2)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    parts = open_store()
    for stored in parts.find(KEY):
        length = stored.state.length
        assert (where / stored.name.part).read_bytes()[:length] == data[:length], stored
        assert stored.state.prefix_sha256 == hashlib.sha256(data[:length]).hexdigest(), stored
        resumed = max(resumed, length)
    parts.close()
parts = open_store()
writer = parts.reopen(parts.find(KEY)[0], rounds + 1)
assert writer.length == resumed, (writer.length, resumed)
writer.write(data[writer.length:])
part = writer.finish()
assert part.path.read_bytes() == data
assert part.digest.hex == hashlib.sha256(data).hexdigest()
parts.discard(KEY, rounds + 1)
assert not list(where.iterdir()), list(where.iterdir())
print(resumed)
"""


@pytest.mark.proves("I10", "I17")
@pytest.mark.parametrize("sync", ["sync", "no sync"])
def test_kill_9_at_random_moments_leaves_a_right_prefix(folder: Path, sync: str) -> None:
    """I10, I17, rules 5 and 14: 30 real writers killed, each goes on where the last one stopped."""
    assert int(output_of(KILL, folder, 30, 4, sync)) > 64 << 10


# -- two who want the same part --------------------------------------------------------------

HOLD = """
import os, sys
from pathlib import Path
from scrapy_streaming.storage.parts import PartStore
parts = PartStore(Path(sys.argv[1]))
writer = parts.reopen(parts.find("ab" * 32)[0], int(sys.argv[2]))
print(writer.name.part, flush=True)
sys.stdin.readline()
os.pwrite(writer._fd, bytes(5000), 0)
writer.write(bytes(5000))
print(writer.close(), flush=True)
"""


@pytest.mark.proves("I11")
def test_a_part_somebody_holds_is_copied_and_a_zombie_cannot_alter_the_copy(
    parts: PartStore, folder: Path
) -> None:
    """I11, rule 7: the old owner wakes and writes on, before and after the new one is done."""
    left(parts)
    with process(HOLD, folder, 2) as zombie:
        assert zombie.stdin is not None
        assert zombie.stdout is not None
        held = folder / zombie.stdout.readline().strip()
        stored = parts.find(KEY)[0]
        assert stored.name.fence == 2
        writer = parts.reopen(stored, 3)
        assert writer.path.stat().st_ino != held.stat().st_ino
        assert (writer.kept, stored.name in {found.name for found in parts.find(KEY)}) == (HALF, True)
        writer.write(DATA[HALF : HALF + 10])
        zombie.stdin.write("wake\n")
        zombie.stdin.flush()
        assert zombie.stdout.readline() == f"{HALF + 5000}\n"
        assert held.read_bytes()[:5000] == bytes(5000)
        go_on(writer)
    assert zombie.returncode == 0
    with pytest.raises(PartCorrupt):
        parts.reopen(next(found for found in parts.find(KEY) if found.name.fence == 2), 4)


@pytest.mark.proves("I11")
def test_a_zombie_whose_part_was_discarded_harms_nobody(parts: PartStore, folder: Path) -> None:
    """I11: it writes into a file without a name, and its sidecar vouches for nothing that is there."""
    zombie = parts.create(KEY, 1, STATE)
    zombie.write(DATA[:HALF])
    zombie.checkpoint()
    writer = parts.reopen(parts.find(KEY)[0], 2)
    parts.discard(KEY, 2, keep=writer.name)
    zombie.write(b"x" * 100)
    zombie.checkpoint()
    assert [found.name for found in parts.find(KEY)] == [writer.name]
    zombie.close()
    go_on(writer)
    parts.discard(KEY, 2)
    assert list(folder.iterdir()) == []


@pytest.mark.proves("I11", "I17")
def test_a_part_that_is_a_blob_already_is_copied_never_written(
    parts: PartStore, folder: Path, tmp_path: Path
) -> None:
    """I11, I17: killed between link and clean-up."""
    stored = left(parts)
    blob = tmp_path / "blob"
    with (folder / stored.name.part).open("ab") as stream:
        stream.write(b"tail that must stay")
    blob.hardlink_to(folder / stored.name.part)
    writer = parts.reopen(stored, 2)
    assert writer.path.stat().st_ino != blob.stat().st_ino
    go_on(writer)
    assert blob.read_bytes() == DATA[:HALF] + b"tail that must stay"


Meanwhile = Callable[[PartStore, StoredPart, Path], tuple[Path, bytes]]


def linked(parts: PartStore, stored: StoredPart, blob: Path) -> tuple[Path, bytes]:
    """Its writer, still alive a moment ago, finishes and publishes."""
    writer = parts.reopen(stored, 1)
    go_on(writer)
    blob.hardlink_to(writer.path)
    return blob, DATA


def finished(parts: PartStore, stored: StoredPart, blob: Path) -> tuple[Path, bytes]:
    """It finishes, and is about to publish."""
    writer = parts.reopen(stored, 1)
    go_on(writer)
    return writer.path, DATA


def longer(parts: PartStore, stored: StoredPart, blob: Path) -> tuple[Path, bytes]:
    """It goes on, and its connection breaks."""
    writer = parts.reopen(stored, 1)
    writer.write(DATA[HALF : HALF + 500])
    writer.close()
    return writer.path, DATA[: HALF + 500]


def adopted(parts: PartStore, stored: StoredPart, blob: Path) -> tuple[Path, bytes]:
    """Another claim takes it, and its connection breaks."""
    writer = parts.reopen(stored, 2)
    writer.write(DATA[HALF : HALF + 500])
    writer.close()
    return writer.path, DATA[: HALF + 500]


def swapped(parts: PartStore, stored: StoredPart, blob: Path) -> tuple[Path, bytes]:
    """The name is another file's with the same bytes; the first one is somebody else's now."""
    path = parts.directory / stored.name.part
    path.rename(blob)
    path.write_bytes(DATA[:HALF])
    return blob, DATA[:HALF]


@pytest.mark.proves("I11", "I17")
@pytest.mark.parametrize("meanwhile", [linked, finished, longer, adopted, swapped])
@pytest.mark.parametrize("at", ["before the open", "before the lock"])
def test_a_part_that_moved_on_since_it_was_found_is_not_written(
    parts: PartStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: Meanwhile, at: str
) -> None:
    """I11, I17: the lock proves that nobody writes now, not that nobody did since."""
    stored, others = left(parts), []
    real = durable.try_lock

    def lock(fd: int) -> bool:
        monkeypatch.setattr(durable, "try_lock", real)
        others.append(meanwhile(parts, stored, tmp_path / "blob"))
        return real(fd)

    if at == "before the lock":
        monkeypatch.setattr(durable, "try_lock", lock)
    else:
        others.append(meanwhile(parts, stored, tmp_path / "blob"))
    if meanwhile is adopted and at == "before the open":
        with pytest.raises(PartCorrupt):
            parts.reopen(stored, 3)
    else:
        go_on(parts.reopen(stored, 3))
    [(path, data)] = others
    assert path.read_bytes() == data


@pytest.mark.proves("I11")
def test_an_older_claim_never_adopts_a_later_ones_part(parts: PartStore) -> None:
    """I11: by copy at most."""
    stored = left(parts, fence=5)
    writer = parts.reopen(stored, 4)
    assert stored.name in {found.name for found in parts.find(KEY)}
    assert writer.name.fence == 4
    writer.abandon()


def test_concurrent_takeovers_give_each_its_own_file(parts: PartStore) -> None:
    """Rule 7: one renames, the others copy or find it gone."""
    stored = left(parts)
    writers: list[PartWriter] = []
    barrier = threading.Barrier(8)

    def take(fence: int) -> None:
        barrier.wait()
        with suppress(PartCorrupt):
            writers.append(parts.reopen(stored, fence))

    threads = [threading.Thread(target=take, args=(fence,)) for fence in range(2, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert writers
    assert len({writer.path.stat().st_ino for writer in writers}) == len(writers)
    for writer in writers:
        go_on(writer)


def test_threads_that_look_at_once_see_every_part(parts: PartStore, folder: Path) -> None:
    """A position in the directory that two listings share would hide parts, and fetch them again."""
    left(parts)
    for number in range(300):
        (folder / f"other{number}").touch()
    found: list[int] = []

    def look() -> None:
        found.extend(len(parts.find(KEY)) for _ in range(30))

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1] * 240


READ_ONLY = """
import os, sys, tempfile, shutil
from pathlib import Path
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.storage.parts import PartStore
where = tempfile.mkdtemp(dir="/dev/shm")
if os.geteuid() == 0:
    os.chown(where, 65534, 65534)
    os.setuid(65534)
try:
    parts = PartStore(Path(where))
    key, state = "ab" * 32, PartState("https://h/", Validators())
    writer = parts.create(key, 1, state)
    writer.write(b"all of it")
    part = writer.finish()
    os.chmod(part.path, 0o444)
    [stored] = parts.find(key)
    assert parts.complete_part(stored).digest == part.digest
    again = parts.reopen(stored, 2)
    assert again.kept == 9 and again.path.read_bytes() == b"all of it"
finally:
    for entry in Path(where).iterdir():
        entry.unlink()
    print(where)
"""


def test_a_part_made_read_only_for_its_blob_is_still_found_whole(tmp_path: Path) -> None:
    """R7, R67: killed between ``fchmod`` and ``link``, as a user who is not root."""
    Path(output_of(READ_ONLY).strip()).rmdir()


# -- planted things --------------------------------------------------------------------------


def plant(kind: str, path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    if kind == "symlink":
        path.symlink_to(target)
    elif kind == "dangling":
        path.symlink_to(target.with_name("nowhere"))
    elif kind == "hard link":
        path.hardlink_to(target)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()


PLANTED = ["symlink", "dangling", "hard link", "fifo", "directory"]


@pytest.mark.proves("F24")
@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("adopt", [True, False], ids=["rename", "copy"])
def test_a_thing_planted_as_part_is_refused_and_its_target_unchanged(
    folder: Path, tmp_path: Path, kind: str, adopt: bool
) -> None:
    """F24, E2."""
    parts = PartStore(folder, adopt=adopt)
    target = tmp_path / "target"
    target.write_bytes(b"precious" * 30_000)
    stored = left(parts)
    plant(kind, folder / stored.name.part, target)
    for call in (lambda: parts.reopen(stored, 2), lambda: parts.complete_part(stored)):
        with pytest.raises(PartCorrupt):
            call()
    parts.remove(stored.name)
    assert target.read_bytes() == b"precious" * 30_000
    assert not (tmp_path / "nowhere").exists()
    go_on(parts.create(KEY, 1, STATE))
    parts.close()


@pytest.mark.proves("F24")
@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("which", ["sidecar", "temporary"])
def test_a_thing_planted_as_sidecar_is_neither_read_nor_written_through(
    parts: PartStore, folder: Path, tmp_path: Path, kind: str, which: str
) -> None:
    """F24, E2: also under the name a sidecar is written by."""
    stored = left(parts)
    target = tmp_path / "target"
    text = b"precious"
    target.write_bytes(text)
    plant(kind, folder / getattr(stored.name, which), target)
    if which == "sidecar":
        assert parts.find(KEY) == []
        go_on(parts.create(KEY, 1, STATE))
    elif kind == "directory":
        with pytest.raises(WriteFailed):
            parts.reopen(stored, 1).finish()
    else:
        go_on(parts.reopen(stored, 1))
    assert target.read_bytes() == text
    assert not (tmp_path / "nowhere").exists()


def test_a_store_that_is_a_link_is_not_opened(tmp_path: Path) -> None:
    """E2."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(OSError, match="link"):
        PartStore(tmp_path / "link")


# -- removal ---------------------------------------------------------------------------------


@pytest.mark.proves("I11", "I15")
def test_discard_never_touches_later_claims_other_jobs_or_foreign_names(
    parts: PartStore, folder: Path
) -> None:
    """I11, I15, E12."""
    foreign = [
        f"{KEY}.1-0.part.bak",
        f"{KEY}.1.part",
        f"{KEY}.01-0.part",
        f"{KEY}.1-00.part",
        f"{KEY}.-1-0.part",
        f"{KEY.upper()}.1-0.part",
        f"{KEY}0.1-0.part",
        f"{KEY}.1-0.json.tmp.tmp",
        f"{KEY}.１-0.part",
        f"{KEY}.1-0.part\n",
        "README",
    ]
    for name in foreign:
        (folder / name).write_bytes(b"mine")
    kept = {left(parts, fence=3).name, left(parts, key=OTHER).name}
    for fence in (1, 1, 2):
        left(parts, fence=fence)
    (folder / f"{KEY}.2-7.json.tmp").write_bytes(b"torn by a kill")
    (folder / f"{KEY}.1-9.part").write_bytes(b"without a sidecar")
    parts.discard(KEY, 2)
    expected = {file for name in kept for file in (name.part, name.sidecar)}
    assert {entry.name for entry in folder.iterdir()} == expected | set(foreign)


def test_keep_longest_keeps_what_a_later_attempt_would_build_on(parts: PartStore) -> None:
    longest = left(parts, DATA[:300]).name
    left(parts, DATA[:100])
    left(parts, DATA[:200], fence=2)
    later = left(parts, DATA[:50], fence=3).name
    parts.keep_longest(KEY, 2)
    assert [found.name for found in parts.find(KEY)] == [longest, later]
    parts.keep_longest(OTHER, 2)


def test_names_are_read_back_as_they_were_made() -> None:
    """E12: one name, one spelling."""
    name = PartName(KEY, 12, 3)
    for file in (name.part, name.sidecar, name.temporary):
        assert PartName.parse(file) == name
    for file in ("", KEY, f"{KEY}.1-1", f"{KEY}.1-1.part ", f"../{KEY}.1-1.part", f"{KEY}.{10**19}-1.part"):
        assert PartName.parse(file) is None


def test_a_removal_that_is_cut_short_leaves_nothing_that_vouches(
    parts: PartStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage rule 4: the sidecar goes first."""
    stored = left(parts)
    trace = Trace(monkeypatch)
    parts.remove(stored.name)
    gone = [name for _, name in trace.calls]
    assert gone.index(stored.name.sidecar) < gone.index(stored.name.part)
    assert list(folder.iterdir()) == []
