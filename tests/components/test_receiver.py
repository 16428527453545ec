"""The receiver on the reactor: back-pressure, stalls, a disk that fails (F21, F28)."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from scrapy.exceptions import DownloadCancelledError, DownloadTimeoutError, ResponseDataLossError
from scrapy.settings import Settings
from scrapy.utils.defer import maybe_deferred_to_future
from support.reactor import on_reactor
from twisted.internet.defer import Deferred

from scrapy_streaming.exceptions import LeaseLost, WriteFailed
from scrapy_streaming.protocol.answers import Replace
from scrapy_streaming.protocol.fields import EntityTag
from scrapy_streaming.protocol.parts import BodyEnd, PartState
from scrapy_streaming.protocol.reasons import Reason
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.runtime.body_writer import BodyWriter, Budget, Task
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage.parts import PartStore

KEY = "ab" * 32
PIECE = os.urandom(64 << 10)
MIB = 1 << 20


class Gated:
    """A writer that waits for the bench's ``gate`` before each write; ``at_gate`` is set once it does."""

    def __init__(self, writer, bench: Bench) -> None:
        self._writer, self._bench = writer, bench

    def __getattr__(self, name):
        return getattr(self._writer, name)

    def write(self, data) -> None:
        self._bench.at_gate.set()
        assert self._bench.gate.wait(60)
        if self._bench.error is not None:
            raise self._bench.error
        self._writer.write(data)


@dataclass
class Bench:
    """A store, a transport that only notes what is wanted of it, and a disk with a gate."""

    parts: PartStore
    budget: Budget = field(default_factory=Budget)
    gate: threading.Event = field(default_factory=threading.Event)
    at_gate: threading.Event = field(default_factory=threading.Event)
    opened: int = 0
    valid: bool = True
    taken: bool = True  # by another worker, once the lease is not valid
    error: Exception | None = None

    async def assure(self) -> None:
        while not self.valid:
            if self.taken:
                raise LeaseLost("another worker has the job")
            await soon(0.01)

    def receiver(self, key: str = KEY, *, max_size: int = 0, total: int | None = None, **settings) -> Rig:
        calls: list[str] = []
        state = PartState("http://x/", Validators(EntityTag.parse('"a"')), total=total)

        def open_part():
            self.opened += 1
            return Gated(self.parts.create(key, 1, state), self)

        task = Task(
            "http://x/",
            Replace(state, Reason.FETCHED),
            open_part,
            lambda: None,
            lambda: self.valid,
            self.assure,
            expected=False,
            unmarked=None,
            max_size=max_size,
        )
        loaded = StreamingSettings.load(
            Settings({f"STREAMING_{k.upper()}": v for k, v in settings.items()}), {}
        )
        return Rig(BodyWriter(task, lambda: calls.append("abort"), loaded, self.budget), calls)


@dataclass
class Rig:
    receiver: BodyWriter
    calls: list[str]

    def write(self, data: bytes) -> None:
        """Give bytes as a source does that pauses when it is asked to."""
        ready = self.receiver.write(data)
        if ready is not None:
            self.calls.append("pause")
            ready.addCallback(self._resume)

    def _resume(self, _: None) -> None:
        if "abort" not in self.calls:
            self.calls.append("resume")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(PartStore(tmp_path, fsync=False))
    yield bench
    bench.gate.set()
    bench.parts.close()


async def soon(seconds: float = 0.05) -> None:
    from twisted.internet import reactor

    waited: Deferred[None] = Deferred()
    reactor.callLater(seconds, waited.callback, None)
    await maybe_deferred_to_future(waited)


async def until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Return as soon as *condition* holds; fail if it does not in time."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it did not come to that"
        await soon(0.01)


def feed(rig: Rig, pieces: int) -> None:
    for _ in range(pieces):
        rig.write(PIECE)


@on_reactor
@pytest.mark.proves("I12")
async def test_the_transport_is_paused_above_the_buffer_and_resumed_below_a_quarter(bench: Bench) -> None:
    rig = bench.receiver(buffer_bytes=MIB)
    feed(rig, 16)
    assert rig.calls == [], "exactly the buffer is no more than it"
    feed(rig, 1)
    assert rig.calls == ["pause"]
    await soon()
    assert rig.calls == ["pause"], "the disk took nothing yet"
    assert bench.budget.used == 17 * len(PIECE)
    bench.gate.set()
    await until(lambda: rig.calls == ["pause", "resume"])
    feed(rig, 3)
    rig.receiver.ended(BodyEnd.FRAMED)
    part = await rig.receiver.finished()
    assert part.length == 20 * len(PIECE)
    assert part.digest.hex == hashlib.sha256(PIECE * 20).hexdigest()
    assert part.path.read_bytes() == PIECE * 20
    assert bench.budget.used == 0
    assert rig.calls == ["pause", "resume"]


@on_reactor
async def test_all_downloads_together_are_bounded(bench: Bench) -> None:
    bench.budget.limit = MIB
    first, second = bench.receiver(buffer_bytes=8 * MIB), bench.receiver("cd" * 32, buffer_bytes=8 * MIB)
    feed(first, 14)
    assert first.calls == []
    feed(second, 4)
    assert second.calls == ["pause"]
    bench.gate.set()
    await until(lambda: second.calls == ["pause", "resume"])
    for rig in (first, second):
        rig.receiver.ended(BodyEnd.FRAMED)
        await rig.receiver.finished()
    assert bench.budget.used == 0


@on_reactor
async def test_a_paused_transport_is_no_stall_but_a_silent_one_is(bench: Bench) -> None:
    rig = bench.receiver(buffer_bytes=MIB, stall_timeout=0.3)
    feed(rig, 20)
    await soon(0.7)
    assert rig.calls == ["pause"]
    bench.gate.set()
    await until(lambda: rig.calls == ["pause", "resume", "abort"])
    with pytest.raises(DownloadTimeoutError, match="stalled"):
        await rig.receiver.finished()
    (kept,) = bench.parts.find(KEY)
    assert kept.state.length == 20 * len(PIECE)
    assert kept.state.prefix_sha256 == hashlib.sha256(PIECE * 20).hexdigest()


@on_reactor
async def test_time_spent_paused_does_not_make_a_body_slow(bench: Bench) -> None:
    rig = bench.receiver(buffer_bytes=MIB, stall_timeout=0.4, min_rate=10_000_000)
    feed(rig, 20)
    await soon(0.9)
    bench.gate.set()
    await until(lambda: rig.calls == ["pause", "resume"])
    rig.receiver.ended(BodyEnd.FRAMED)
    await rig.receiver.finished()


@on_reactor
async def test_a_body_below_the_least_rate_is_broken_off_and_kept(bench: Bench) -> None:
    bench.gate.set()
    rig, quick = (bench.receiver(str(n) * 64, stall_timeout=0.4, min_rate=100_000) for n in (1, 2))
    for _ in range(400):
        rig.write(b"x" * 1000)
        quick.write(b"x" * 50_000)
        await soon(0.05)
        if rig.calls:
            break
    assert rig.calls[-1:] == ["abort"]
    assert "abort" not in quick.calls
    with pytest.raises(DownloadTimeoutError, match="too-slow"):
        await rig.receiver.finished()
    (kept,) = bench.parts.find("1" * 64)
    assert kept.state.length >= 1000
    quick.receiver.ended(BodyEnd.FRAMED)
    await quick.receiver.finished()


@on_reactor
async def test_a_disk_that_fails_ends_the_download_at_once(bench: Bench) -> None:
    bench.error = WriteFailed("no space left", reason="no-space")
    bench.gate.set()
    rig = bench.receiver()
    feed(rig, 8)
    with pytest.raises(WriteFailed):
        await rig.receiver.finished()
    assert "abort" in rig.calls
    assert bench.budget.used == 0


@on_reactor
async def test_nothing_more_is_written_under_a_lease_that_was_lost(bench: Bench) -> None:
    """F15: only what the thread was writing already is written."""
    rig = bench.receiver(buffer_bytes=8 * MIB)
    feed(rig, 32)
    await until(bench.at_gate.is_set)
    bench.valid = False
    bench.gate.set()
    with pytest.raises(LeaseLost):
        await rig.receiver.finished()
    assert rig.calls == ["abort"]
    (stored,) = bench.parts.find(KEY)
    assert stored.state.length == len(PIECE)
    assert bench.budget.used == 0


@on_reactor
async def test_a_body_that_ended_meanwhile_is_not_written_either(bench: Bench, tmp_path: Path) -> None:
    bench.gate.set()
    rig = bench.receiver()
    feed(rig, 4)
    await until(lambda: on_disk(tmp_path) == 4 * len(PIECE))
    bench.valid = False
    feed(rig, 2)
    rig.receiver.ended(BodyEnd.FRAMED)
    with pytest.raises(LeaseLost):
        await rig.receiver.finished()
    (stored,) = bench.parts.find(KEY)
    assert (stored.state.length, bench.budget.used) == (4 * len(PIECE), 0)


@on_reactor
@pytest.mark.parametrize("ended", [False, True])
async def test_under_a_lease_that_is_renewed_late_the_same_body_goes_on(
    bench: Bench, tmp_path: Path, ended: bool
) -> None:
    """Rule 1: the job was not taken over: nothing is fetched again. Meanwhile nothing is written (rule 7)."""
    bench.gate.set()
    rig = bench.receiver(buffer_bytes=2 * MIB)
    feed(rig, 4)
    await until(lambda: on_disk(tmp_path) == 4 * len(PIECE))
    bench.valid, bench.taken = False, False
    feed(rig, 33)
    if ended:
        rig.receiver.ended(BodyEnd.FRAMED)
    await until(lambda: rig.calls == ["pause"])
    await soon(0.2)
    assert (on_disk(tmp_path), rig.calls) == (4 * len(PIECE), ["pause"])
    bench.valid = True
    if not ended:
        await until(lambda: rig.calls == ["pause", "resume"])
        rig.receiver.ended(BodyEnd.FRAMED)
    part = await rig.receiver.finished()
    assert (part.length, bench.budget.used) == (37 * len(PIECE), 0)


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.part"))


@on_reactor
async def test_a_body_of_one_batch_never_touches_a_part(bench: Bench) -> None:
    rig = bench.receiver(total=3)
    rig.write(b"a")
    rig.write(b"bc")
    rig.receiver.ended(BodyEnd.FRAMED)
    part = await rig.receiver.finished()
    assert (part.data, part.path, bench.opened) == (b"abc", None, 0)


@on_reactor
async def test_pieces_of_any_size_keep_their_order(bench: Bench) -> None:
    """F21: tiny chunks beside large ones."""
    bench.gate.set()
    rig = bench.receiver()
    sent = b""
    for size in [1, 5000, 2, 3, 70_000, 4095, 4096, 1] * 20:
        piece = os.urandom(size)
        sent += piece
        rig.write(piece)
        if size == 70_000:
            await soon(0.001)
    rig.receiver.ended(BodyEnd.FRAMED)
    part = await rig.receiver.finished()
    assert part.path.read_bytes() == sent


@on_reactor
async def test_a_body_beyond_the_limit_is_broken_off(bench: Bench) -> None:
    bench.gate.set()
    rig = bench.receiver(max_size=100_000)
    feed(rig, 3)
    assert rig.calls == ["abort"]
    with pytest.raises(DownloadCancelledError, match="STREAMING_MAX_SIZE=100000"):
        await rig.receiver.finished()


@on_reactor
async def test_a_lost_body_keeps_what_came(bench: Bench) -> None:
    """R31."""
    bench.gate.set()
    rig = bench.receiver(total=99 * len(PIECE))
    feed(rig, 2)
    rig.receiver.ended(BodyEnd.LOST)
    with pytest.raises(ResponseDataLossError):
        await rig.receiver.finished()
    (kept,) = bench.parts.find(KEY)
    assert kept.state.length == 2 * len(PIECE)
    feed(rig, 1)
    assert rig.receiver.received == 2 * len(PIECE), "after the end nothing is taken"
