"""The add-on puts everything in its place, and never over a user's value."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from scrapy.exceptions import NotConfigured
from scrapy.pipelines.files import FilesPipeline
from scrapy.pipelines.images import ImagesPipeline
from scrapy.settings import Settings
from scrapy.utils.misc import load_object
from support import components

from scrapy_streaming import Addon, StreamingFilesPipeline
from scrapy_streaming.extension import StreamingExtension
from scrapy_streaming.handlers import StreamingDownloadHandler
from scrapy_streaming.middleware import ResumeMiddleware
from scrapy_streaming.pipeline import UninvitedFilesPipeline

STREAMING = "scrapy_streaming.pipeline.StreamingFilesPipeline"


def wired(tmp_path: Path, **project: object) -> Settings:
    settings = Settings({"FILES_STORE": str(tmp_path / "store")})
    settings.setdict(project, "project")
    Addon().update_settings(settings)
    return settings


def by_class(settings: Settings, name: str) -> dict:
    """Component → priority, however the component is named."""
    return {load_object(key): value for key, value in settings.getwithbase(name).items()}


def test_everything_is_put_in_its_place(tmp_path: Path) -> None:
    settings = wired(tmp_path)
    assert by_class(settings, "ITEM_PIPELINES") == {UninvitedFilesPipeline: 1}
    assert by_class(settings, "DOWNLOADER_MIDDLEWARES")[ResumeMiddleware] == 595
    assert StreamingExtension in by_class(settings, "EXTENSIONS")
    handlers = settings.getwithbase("DOWNLOAD_HANDLERS")
    assert {load_object(handlers[scheme]) for scheme in ("http", "https")} == {StreamingDownloadHandler}
    plain = Settings().getwithbase("DOWNLOAD_HANDLERS")
    for scheme in ("data", "file", "ftp", "s3"):
        assert handlers[scheme] == plain[scheme]
    assert settings.getdict("STREAMING_FALLBACK_DOWNLOAD_HANDLERS") == {}, "Scrapy may still change its own"
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("named", ["scrapy.pipelines.files.FilesPipeline", FilesPipeline])
def test_files_pipeline_is_replaced_where_it_stands(tmp_path: Path, named: object) -> None:
    settings = wired(tmp_path, ITEM_PIPELINES={named: 42})
    assert by_class(settings, "ITEM_PIPELINES") == {StreamingFilesPipeline: 42}


def test_a_subclass_of_the_streaming_pipeline_is_enough(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        settings = wired(tmp_path, ITEM_PIPELINES={"support.components.OwnPath": 7})
    assert by_class(settings, "ITEM_PIPELINES") == {components.OwnPath: 7}
    assert caplog.records == []


def test_a_subclass_of_scrapys_is_left_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        settings = wired(tmp_path, ITEM_PIPELINES={"support.components.StockOwnPath": 7})
    assert by_class(settings, "ITEM_PIPELINES") == {components.StockOwnPath: 7}
    assert "StockOwnPath" in caplog.text
    assert "StreamingFilesPipeline" in caplog.text


def test_the_images_pipeline_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = wired(tmp_path, ITEM_PIPELINES={"scrapy.pipelines.images.ImagesPipeline": 3})
    assert by_class(settings, "ITEM_PIPELINES") == {ImagesPipeline: 3, UninvitedFilesPipeline: 1}
    assert caplog.records == []


def test_the_users_handlers_are_kept_for_each_scheme(tmp_path: Path) -> None:
    settings = wired(
        tmp_path, DOWNLOAD_HANDLERS={"http": "support.components.MyHandler", "https": None, "ftp": None}
    )
    handlers = settings.getwithbase("DOWNLOAD_HANDLERS")
    assert load_object(handlers["http"]) is StreamingDownloadHandler
    assert handlers["https"] is None, "a scheme that the user switched off stays off"
    assert handlers["ftp"] is None
    kept = settings.getdict("STREAMING_FALLBACK_DOWNLOAD_HANDLERS")
    assert kept == {"http": "support.components.MyHandler"}


def test_what_the_user_placed_stays(tmp_path: Path) -> None:
    settings = wired(
        tmp_path,
        ITEM_PIPELINES={STREAMING: 900},
        DOWNLOADER_MIDDLEWARES={"scrapy_streaming.middleware.ResumeMiddleware": 599},
        EXTENSIONS={"scrapy_streaming.extension.StreamingExtension": 17},
        DOWNLOAD_HANDLERS={"http": "scrapy_streaming.handlers.StreamingDownloadHandler"},
    )
    assert by_class(settings, "ITEM_PIPELINES") == {StreamingFilesPipeline: 900}
    assert by_class(settings, "DOWNLOADER_MIDDLEWARES")[ResumeMiddleware] == 599
    assert by_class(settings, "EXTENSIONS")[StreamingExtension] == 17
    assert "http" not in settings.getdict("STREAMING_FALLBACK_DOWNLOAD_HANDLERS")


def test_bodies_off_takes_none_but_breaks_downloads_off_at_a_stop(tmp_path: Path) -> None:
    """C2: so the handlers are wrapped all the same."""
    settings = wired(tmp_path, STREAMING_IO_ENABLED=False)
    handlers = settings.getwithbase("DOWNLOAD_HANDLERS")
    assert load_object(handlers["https"]) is StreamingDownloadHandler


@pytest.mark.parametrize(
    "handler", ["support.components.ForeignHandler", components.ForeignHandler, "no_such_module.Handler"]
)
def test_a_handler_that_cannot_be_streamed_from_is_left_alone(tmp_path: Path, handler: object) -> None:
    """C15: nor is one loaded that is not there."""
    settings = wired(tmp_path, DOWNLOAD_HANDLERS={"http": handler})
    assert settings.getwithbase("DOWNLOAD_HANDLERS")["http"] == handler
    reactorless = wired(tmp_path, TWISTED_REACTOR_ENABLED=False)
    assert reactorless.getwithbase("DOWNLOAD_HANDLERS") == Settings().getwithbase("DOWNLOAD_HANDLERS")


@pytest.mark.parametrize("priority", ["project", "spider", "cmdline"])
def test_handlers_are_wrapped_wherever_they_are_named(tmp_path: Path, priority: str) -> None:
    """C15."""
    settings = Settings({"FILES_STORE": str(tmp_path / "store")})
    settings.set("DOWNLOAD_HANDLERS", {"http": "support.components.MyHandler"}, priority)
    Addon().update_settings(settings)
    assert load_object(settings.getwithbase("DOWNLOAD_HANDLERS")["http"]) is StreamingDownloadHandler
    kept = settings.getdict("STREAMING_FALLBACK_DOWNLOAD_HANDLERS")
    assert kept == {"http": "support.components.MyHandler"}


@pytest.mark.parametrize(
    "off", ["scrapy.pipelines.files.FilesPipeline", FilesPipeline, STREAMING, "support.components.OwnPath"]
)
def test_a_pipeline_that_is_switched_off_is_not_replaced(tmp_path: Path, off: object) -> None:
    """C5."""
    settings = wired(tmp_path, ITEM_PIPELINES={off: None})
    assert settings.getdict("ITEM_PIPELINES") == {off: None}


@pytest.mark.parametrize(
    "project", [{"STREAMING_ENABLED": False}, {"FILES_STORE": ""}, {"FILES_STORE": "s3://x/y"}]
)
def test_off_means_untouched(tmp_path: Path, project: dict) -> None:
    settings = Settings({"FILES_STORE": str(tmp_path)} | project)
    before = settings.copy_to_dict()
    with pytest.raises(NotConfigured) as raised:
        Addon().update_settings(settings)
    assert bool(raised.value.args) == ("s3" in settings["FILES_STORE"]), "what Scrapy would warn of"
    assert settings.copy_to_dict() == before
