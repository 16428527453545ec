"""A stop by the user: noticed, published to subscribers, or left to finish (C2, C3)."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from support.reactor import on_reactor
from units.crawl import FakeCrawler, turn

from scrapy_streaming.exceptions import StreamingError
from scrapy_streaming.runtime import shutdown
from scrapy_streaming.runtime.items import ItemsInWork
from scrapy_streaming.runtime.shutdown import CrawlStopping, Shutdown, finishes


class Rig:
    """A shutdown with one subscriber that has two downloads in flight."""

    def __init__(self, *, finishing: bool = False, bodies: Any = (), buffering: Any = ()) -> None:
        self.crawler = FakeCrawler()
        self.items = ItemsInWork()
        self.errors: list[StreamingError] = []
        self.reports = 0
        self.shutdown = Shutdown(
            self.crawler,  # type: ignore[arg-type]
            self.items,
            finishes=finishing,
            bodies=bodies,
            buffering=buffering,
            at_once=self._report,
        )
        self.shutdown.subscribe(self._break_off)
        self.shutdown.start()

    def _break_off(self, error) -> int:
        self.errors += [error(), error()]
        return 2

    async def _report(self) -> None:
        self.reports += 1

    def stop(self) -> None:
        self.crawler.crawling = False
        self.shutdown.check()


@on_reactor
async def test_a_crawl_that_goes_on_is_not_stopping() -> None:
    rig = Rig()
    rig.shutdown.check()
    rig.shutdown.refuse()
    assert (rig.shutdown.by_user, rig.shutdown.stopping, rig.errors) == (False, False, [])


@on_reactor
async def test_a_shell_that_never_crawled_is_not_stopping() -> None:
    crawler = FakeCrawler()
    crawler.crawling = False
    idle = Shutdown(crawler, ItemsInWork(), finishes=False, bodies=(), buffering=(), at_once=turn)  # type: ignore[arg-type]
    idle.start()
    assert not idle.stopping


@on_reactor
async def test_a_stop_breaks_off_with_an_error_for_each(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    rig = Rig()
    rig.stop()
    assert len(set(map(id, rig.errors))) == 2
    assert all(isinstance(error, CrawlStopping) for error in rig.errors)
    with pytest.raises(CrawlStopping):
        rig.shutdown.refuse()
    rig.shutdown.check()  # what began meanwhile
    rig.shutdown.kept_bytes = 7
    rig.shutdown.end()
    assert "stopped with 4 downloads broken off, 7 bytes of them kept" in caplog.text


@on_reactor
async def test_a_stop_that_finishes_refuses_nothing_and_says_what_is_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    bodies = [SimpleNamespace(left=left, concluded=left == 1) for left in (5, None, 1)]
    rig = Rig(finishing=True, bodies=bodies)
    rig.items.enter()
    rig.stop()
    rig.shutdown.refuse()
    rig.shutdown.check()
    assert rig.errors == []
    assert caplog.text.count("finishing 1 items and 2 downloads in flight, 5 bytes left at least") == 1


@on_reactor
async def test_without_a_ledger_nothing_can_be_finished() -> None:
    rig = Rig(finishing=True)
    rig.shutdown.finish_nothing()
    rig.stop()
    assert len(rig.errors) == 2


@on_reactor
async def test_buffered_bodies_are_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    Rig(buffering={"ftp"}).stop()
    assert "whose bodies Scrapy buffers (ftp) are waited for" in caplog.text


@on_reactor
async def test_subscribers_to_the_stop_are_called_once() -> None:
    rig, calls = Rig(), []
    rig.shutdown.at_stop(lambda: calls.append("stop"))
    rig.stop()
    rig.shutdown.check()
    assert calls == ["stop"]


@on_reactor
async def test_after_the_grace_waits_for_the_ledger_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutdown, "STOP_GRACE", 0.0)
    rig, calls = Rig(), []
    rig.shutdown.after_grace(lambda: calls.append("give up"))
    rig.stop()
    assert calls == []
    await turn()
    assert calls == ["give up"]


@on_reactor
async def test_a_second_stop_keeps_the_parts_and_reports(caplog: pytest.LogCaptureFixture) -> None:
    body = SimpleNamespace(left=1, concluded=False, received=9, url="http://h/a")
    rig = Rig(finishing=True, bodies=[body])

    def conclude(error) -> int:
        body.concluded = True
        return 1

    rig.shutdown.subscribe(conclude)
    await rig.shutdown._keep_parts()
    assert rig.reports == 1
    assert "left unfinished, 9 bytes came: http://h/a" in caplog.text


@pytest.mark.parametrize(
    ("wanted", "settings", "expected"),
    [
        ("finish", {}, True),
        ("checkpoint", {"JOBDIR": "x"}, False),
        ("auto", {}, False),
        ("auto", {"JOBDIR": "x"}, True),
        ("auto", {"SCHEDULER": "units.crawl.FakeCrawler"}, True),
    ],
)
def test_the_scheduler_decides_what_a_stop_does(
    wanted: str, settings: dict[str, Any], expected: bool
) -> None:
    assert finishes(wanted, FakeCrawler(settings).settings) is expected
