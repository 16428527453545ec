"""What is switched off, or only half there, is stock Scrapy (C5)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.beside import FILES, Beside, beside, essence, files_in, levels, loud
from support.crawl import Crawl, run_crawl
from support.origin import Answer, Asked, Origin, Resource

STOCK = "scrapy.pipelines.files.FilesPipeline"
STREAMING = "scrapy_streaming.pipeline.StreamingFilesPipeline"
SUBCLASS = "support.hooks.OverStreaming"
LARGE = b"x" * 400_000


def attached(asked: Asked, resource: Resource) -> Answer:
    return Answer(200, {"Content-Disposition": 'attachment; filename="report.pdf"'}, resource.body)


def site(origin: Origin) -> list[dict[str, Any]]:
    """One item each with a file that is hooked, changed, refused, missing, empty, large, or with none."""
    seven = random.Random(7)
    paths = ["/look/a.bin", "/look/page.html", "/hook/replace.bin", "/media/replace.bin", "/content/c.bin"]
    for path in paths:
        origin.put(path, seven.randbytes(2000))
    origin.put("/hook/refused.bin", b"<html>please log in</html>")
    origin.put("/disposition/d.pdf", seven.randbytes(2000), default=attached)
    origin.put("/empty", b"", default=Answer(200))
    origin.put("/large", seven.randbytes(400_000))
    paths += ["/hook/refused.bin", "/disposition/d.pdf", "/missing", "/empty", "/large"]
    items: list[dict[str, Any]] = [{"file_urls": [origin.url(path)]} for path in paths]
    return [*items, {"file_urls": [origin.url("/large")]}, {"title": "without files"}, {"file_urls": []}]


def assert_stock(found: Beside) -> None:
    """All is as in stock: also the checksums, each note of a hook, and not one file more."""
    found.assert_same()
    assert sorted(map(repr, found.streaming.items)) == sorted(map(repr, found.stock.items))
    notes = [sorted(repr(note) for note in crawl.notes) for crawl in (found.streaming, found.stock)]
    assert notes[0] == notes[1]
    names = [{path.relative_to(s) for path in s.rglob("*")} for s in (found.store, found.stock_store)]
    assert names[0] == names[1], "no .streaming, no blobs, no database"
    for statistic in ("file_count", "file_status_count/downloaded", "file_status_count/uptodate"):
        assert found.streaming.stat(statistic) == found.stock.stat(statistic)
    assert not [name for name in found.streaming.stats if name.startswith("streaming/")]


@pytest.fixture(scope="module")
def hooked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[dict[str, Any]], Crawl, Path]]:
    """Items, and what a subclass of ``FilesPipeline`` makes of them, in which store."""
    origin = Origin()
    items, store = site(origin), tmp_path_factory.mktemp("stock") / "store"
    yield items, run_crawl(items, store, settings=OVER_STOCK), store
    origin.close()


OVER_STOCK = {"ITEM_PIPELINES": {"support.hooks.OverStock": 1}, "ADDONS": {}}


@pytest.mark.parametrize(
    ("switches", "env"),
    [
        pytest.param({"STREAMING_ENABLED": False}, None, id="setting"),
        pytest.param({}, {"SCRAPY_STREAMING_ENABLED": "0"}, id="environment"),
        pytest.param({"ADDONS": {}}, None, id="no-add-on"),
    ],
)
def test_a_subclass_that_is_switched_off_is_a_files_pipeline(
    hooked: tuple[list[dict[str, Any]], Crawl, Path],
    store: Path,
    switches: dict[str, Any],
    env: dict[str, str] | None,
) -> None:
    """C5: the same hooks, items, files, lines; what is stored is found again."""
    items, stock, stock_store = hooked
    crawl = run_crawl(items, store, settings={"ITEM_PIPELINES": {SUBCLASS: 1}} | switches, env=env)
    missing = "support.hooks.OverStreaming works as FilesPipeline does: "
    assert crawl.log.count(missing) == ("ADDONS" in switches), "what is missing is said"
    crawl.log = "\n".join(line for line in crawl.log.splitlines() if missing not in line)
    assert_stock(Beside(stock, crawl, stock_store, store))
    if "STREAMING_ENABLED" in switches:
        again = run_crawl(items, store, settings=OVER_STOCK)
        assert again.stat("file_status_count/uptodate") > 0


@pytest.mark.parametrize(
    "pipelines",
    [
        {STOCK: None},
        {STOCK: None, STREAMING: None, "support.hooks.OverStreaming": None, "support.hooks.Last": 900},
    ],
    ids=["scrapys", "all"],
)
def test_a_pipeline_that_the_user_switched_off_stays_off(
    origin: Origin, tmp_path: Path, pipelines: dict[str, Any]
) -> None:
    """C5: and no other takes its place."""
    found = beside(tmp_path, [origin.put("/a.bin", b"body")], settings={"ITEM_PIPELINES": pipelines})
    found.assert_same()
    assert [item.get("files") for item in found.streaming.items] == [None]
    assert origin.requests == []


def test_scrapys_pipeline_stays_where_the_streaming_one_was_switched_off(
    origin: Origin, tmp_path: Path
) -> None:
    """C5: what the user sets wins; one line says that its files are not streamed."""
    pipelines = {STOCK: 1, STREAMING: None}
    found = beside(tmp_path, [origin.put("/a.bin", b"body")], settings={"ITEM_PIPELINES": pipelines})
    found.assert_same("FilesPipeline stores files as Scrapy does")
    assert "scrapy.pipelines.files.FilesPipeline stores files as Scrapy does" in found.streaming.log


@pytest.mark.parametrize("store", [None, "s3://bucket/path"])
def test_without_a_local_store_all_is_as_in_stock(origin: Origin, tmp_path: Path, store: str | None) -> None:
    """C5: what the user has to know is said once; ``FilesPipeline`` says what it says."""
    settings = {"FILES_STORE": store, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    urls = [origin.put("/a.bin", b"body")]
    said = [f"FILES_STORE={store!r} names no local directory"] if store else []
    found = beside(tmp_path, urls, settings=settings)
    found.assert_same(*said)
    assert len([line for line in loud(found.streaming) if "names no local directory" in line]) == len(said)
    subclass = run_crawl(urls, tmp_path / "store", settings=settings | {"ITEM_PIPELINES": {STREAMING: 1}})
    assert essence(subclass) == essence(found.stock)
    assert levels(subclass, *said) == levels(found.stock)


def test_a_project_without_files_is_untouched(origin: Origin, tmp_path: Path) -> None:
    """C5: with no store no component of the package is in the crawl, and nothing is warned of."""
    bare = {"ITEM_PIPELINES": {"support.hooks.Last": 900}, "FILES_STORE": None}
    items = [{"title": "a"}, {"file_urls": [origin.put("/a.bin", b"body")]}]
    found = beside(tmp_path, items, settings=bare)
    found.assert_same()
    assert origin.requests == []
    assert not found.store.exists()


PARTS = {
    "extension": {"EXTENSIONS": {"scrapy_streaming.extension.StreamingExtension": 0}},
    "middleware": {"DOWNLOADER_MIDDLEWARES": {"scrapy_streaming.middleware.ResumeMiddleware": 595}},
    "handler": {"DOWNLOAD_HANDLERS": {"http": "scrapy_streaming.handlers.StreamingDownloadHandler"}},
    "pipeline": {"ITEM_PIPELINES": {STREAMING: 1}},
}
#: What is said where one part is missing that another one needs, by words of that line.
MISSING = {
    "extension": "scrapy_streaming.extension.StreamingExtension is not in EXTENSIONS",
    "middleware": "scrapy_streaming.middleware.ResumeMiddleware is not in DOWNLOADER_MIDDLEWARES",
    "handler": 'set DOWNLOAD_HANDLERS["http"] = "scrapy_streaming.handlers.StreamingDownloadHandler"',
}


def lines(named: set[str]) -> dict[str, int]:
    """Return how often each line is said: the pipeline needs all, the middleware the extension."""
    asks = {"pipeline", "middleware"} & named
    if "extension" not in named:
        return {"extension": len(asks)}
    found = {"middleware": "pipeline" in named - {"middleware"}} if "middleware" not in named else {}
    if {"pipeline", "middleware"} <= named and "handler" not in named:
        found["handler"] = True
    return {name: int(said) for name, said in found.items() if said}


HALVES = [set(some) for count in range(1, 4) for some in itertools.combinations(PARTS, count)]
#: Of those without the pipeline, which is what lacks the others, the smallest and the largest.
HALVES = [some for some in HALVES if "pipeline" in some or len(some) == 3 or some == {"middleware"}]


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[str], Crawl]]:
    """URLs of a small file, a large one and none, and what stock makes of them."""
    origin = Origin()
    urls = [origin.put("/a.bin", b"body"), origin.put("/b.bin", LARGE), origin.url("/missing")]
    yield urls, run_crawl(urls, tmp_path_factory.mktemp("stock") / "store", settings={**FILES, "ADDONS": {}})
    origin.close()


@pytest.mark.parametrize("named", HALVES, ids=["-".join(sorted(some)) for some in HALVES])
def test_components_that_are_left_over_work_as_stock_and_log_what_is_missing(
    left: tuple[list[str], Crawl], store: Path, named: set[str]
) -> None:
    """C5: in every combination, without the add-on."""
    urls, stock = left
    settings: dict[str, Any] = {**FILES, "ADDONS": {}}
    for name in named:
        settings |= PARTS[name]
    crawl = run_crawl(urls, store, settings=settings)
    assert essence(crawl) == essence(stock)
    assert sorted(files_in(store).values()) == [b"body", LARGE]
    said = {name: crawl.log.count(text) for name, text in MISSING.items() if text in crawl.log}
    assert said == {name: count for name, count in lines(named).items() if count}
    one_line = {"WARNING": 1} if {"extension", "pipeline"} <= named else levels(stock)  # C18
    assert levels(crawl, *MISSING.values()) == one_line
    if "extension" not in named:
        assert [path.name for path in store.iterdir()] == ["full"], "no .streaming, no blobs, no database"
