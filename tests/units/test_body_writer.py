"""A body that pauses its source, and what becomes of the pause when it fails (I12)."""

from __future__ import annotations

import pytest
from scrapy.settings import Settings
from support.reactor import on_reactor

from scrapy_streaming.protocol.answers import Replace
from scrapy_streaming.protocol.parts import BodyEnd, PartState
from scrapy_streaming.protocol.reasons import Reason
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.runtime.body_writer import BATCH, BodyWriter, Budget, Task
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage.part_writer import PartWriter

URL = "https://h.example/a.bin"


class Rig:
    """A body of unknown length; ``calls`` is what its source was asked to do."""

    def __init__(self, *, wait: float) -> None:
        self.calls: list[str] = []
        self.budget = Budget()
        self.task = Task(
            URL,
            Replace(PartState(URL, Validators()), Reason.FETCHED),
            self.open_part,
            after_failure=lambda: None,
            is_valid=lambda: True,
            ensure_lease=self.ensure_lease,
            expected=False,
            unmarked=None,
            max_size=0,
            wait=lambda _: wait,
        )
        settings = StreamingSettings.load(Settings({"FILES_STORE": "/nowhere"}), {})
        self.body = BodyWriter(self.task, lambda: self.calls.append("abort"), settings, self.budget)

    def open_part(self) -> PartWriter:
        raise RuntimeError("a mistake, no error of the disk")

    async def ensure_lease(self) -> None: ...

    def write(self, data: bytes) -> None:
        ready = self.body.write(data)
        if ready is not None:
            self.calls.append("pause")
            ready.addCallback(lambda _: self.calls.append("ready"))


@on_reactor
async def test_a_body_that_fails_unexpectedly_in_a_pause_is_forgotten() -> None:
    """The source is closed before it is let go on, and no budget waits for it."""
    rig = Rig(wait=60)
    rig.write(bytes(BATCH))
    assert (rig.calls, rig.budget.waiting) == (["pause"], {rig.body})
    with pytest.raises(RuntimeError, match="a mistake"):
        await rig.body.finished()
    assert rig.calls == ["pause", "abort", "ready"]
    assert (rig.budget.waiting, rig.budget.used) == (set(), 0)


@on_reactor
async def test_a_body_that_is_broken_off_in_a_pause_lets_its_source_go_on() -> None:
    """A source that awaits what ``write`` gave would wait for ever."""
    rig = Rig(wait=60)
    rig.write(b"abc")
    rig.body.break_off(OSError("gone"))
    assert rig.calls == ["pause", "abort", "ready"]
    rig.body.ended(BodyEnd.FRAMED)
    with pytest.raises(OSError, match="gone"):
        await rig.body.finished()
    assert (rig.budget.waiting, rig.budget.used) == (set(), 0)
