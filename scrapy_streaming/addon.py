"""The add-on: puts every component in its place, at add-on priority."""

from __future__ import annotations

import logging
import os

from scrapy.exceptions import NotConfigured
from scrapy.pipelines.files import FilesPipeline
from scrapy.pipelines.images import ImagesPipeline
from scrapy.settings import BaseSettings
from scrapy.utils.misc import load_object

from scrapy_streaming.exceptions import SettingError, StoreError
from scrapy_streaming.extension import StreamingExtension
from scrapy_streaming.handler import StreamingDownloadHandler
from scrapy_streaming.middleware import ResumeMiddleware
from scrapy_streaming.pacing import StartPacing
from scrapy_streaming.pipeline import StreamingFilesPipeline, UninvitedFilesPipeline
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage import check_store

logger = logging.getLogger(__name__)

MIDDLEWARE_ORDER = 595
#: Nearest to the engine: what others add to ``start()`` counts, and what they keep does not.
PACING_ORDER = 0


class Addon:
    """``ADDONS = {"scrapy_streaming.Addon": 300}`` is all that a project needs."""

    @classmethod
    def update_pre_crawler_settings(cls, settings: BaseSettings) -> None:
        """Stop with one line if a setting cannot be read, or the store cannot be used."""
        try:
            loaded = StreamingSettings.load(settings, os.environ)
            if loaded.enabled:
                check_store(loaded)
        except (SettingError, StoreError) as error:
            msg = f"scrapy-streaming: {error}"
            raise SystemExit(msg) from None

    def update_settings(self, settings: BaseSettings) -> None:
        """Wire the components; raise ``NotConfigured`` when there is nothing to wire."""
        loaded = StreamingSettings.load(settings, os.environ)
        if not loaded.enabled:
            reason = "STREAMING_ENABLED is off: Scrapy's own FilesPipeline and handlers do the work"
            raise NotConfigured(reason)
        if loaded.store is None:
            reason = f"FILES_STORE={settings.get('FILES_STORE')!r} names no local directory"
            raise NotConfigured(reason)
        settings.setdefault_in_component_priority_dict("EXTENSIONS", StreamingExtension, 0)
        settings.setdefault_in_component_priority_dict(
            "DOWNLOADER_MIDDLEWARES", ResumeMiddleware, MIDDLEWARE_ORDER
        )
        settings.setdefault_in_component_priority_dict("SPIDER_MIDDLEWARES", StartPacing, PACING_ORDER)
        _wire_pipeline(settings)
        _wire_handlers(settings)


def _wire_pipeline(settings: BaseSettings) -> None:
    """Take the place of ``FilesPipeline``, or add ours where no pipeline takes ``file_urls``."""
    classes = [load_object(path) for path in settings.getdict("ITEM_PIPELINES")]
    if FilesPipeline in classes:
        settings.replace_in_component_priority_dict("ITEM_PIPELINES", FilesPipeline, StreamingFilesPipeline)
        return
    files = [c for c in classes if issubclass(c, FilesPipeline) and not issubclass(c, ImagesPipeline)]
    if not files:
        settings.setdefault_in_component_priority_dict("ITEM_PIPELINES", UninvitedFilesPipeline, 1)
    for other in files:
        if not issubclass(other, StreamingFilesPipeline):
            logger.warning(
                "%s stores files as Scrapy does: let it subclass scrapy_streaming.StreamingFilesPipeline "
                "to have them streamed",
                f"{other.__module__}.{other.__qualname__}",
            )


def _wire_handlers(settings: BaseSettings) -> None:
    """Wrap the handlers of http and https, keeping the user's."""
    handlers = settings.getwithbase("DOWNLOAD_HANDLERS")
    kept = {}
    for scheme in ("http", "https"):
        path = handlers.get(scheme)
        if path is None or load_object(path) is StreamingDownloadHandler:
            continue
        kept[scheme] = path
        settings["DOWNLOAD_HANDLERS"][scheme] = "scrapy_streaming.handler.StreamingDownloadHandler"
    settings.set(
        "STREAMING_FALLBACK_DOWNLOAD_HANDLERS",
        {**kept, **settings.getdict("STREAMING_FALLBACK_DOWNLOAD_HANDLERS")},
        "addon",
    )
