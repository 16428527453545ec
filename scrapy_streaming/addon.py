"""The add-on: puts every component in its place, at add-on priority."""

from __future__ import annotations

import logging
import os
from typing import Any, NoReturn

from scrapy.exceptions import NotConfigured
from scrapy.pipelines.files import FilesPipeline
from scrapy.pipelines.images import ImagesPipeline
from scrapy.settings import SETTINGS_PRIORITIES, BaseSettings
from scrapy.utils.misc import load_object

from scrapy_streaming import schemes
from scrapy_streaming.exceptions import SettingError, StoreError
from scrapy_streaming.extension import StreamingExtension
from scrapy_streaming.middleware import ResumeMiddleware
from scrapy_streaming.pacing import StartPacing
from scrapy_streaming.pipeline import StreamingFilesPipeline, UninvitedFilesPipeline
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage import check_store
from scrapy_streaming.texts import clean, clean_record

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)

MIDDLEWARE_ORDER = 595
#: Nearest to the engine: what others add to ``start()`` counts, and what they keep does not.
PACING_ORDER = 0
_ADDON_PRIORITY = SETTINGS_PRIORITIES["addon"]


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
            msg = f"scrapy-streaming: {clean(error)}"
            raise SystemExit(msg) from None

    def update_settings(self, settings: BaseSettings) -> None:
        """Wire the components; raise ``NotConfigured`` when there is nothing to wire."""
        loaded = StreamingSettings.load(settings, os.environ)
        if not loaded.enabled:
            raise NotConfigured  # as the user wants it: nothing to say
        if loaded.store is None:
            _leave_as_it_is(settings)
        settings.setdefault_in_component_priority_dict("EXTENSIONS", StreamingExtension, 0)
        settings.setdefault_in_component_priority_dict(
            "DOWNLOADER_MIDDLEWARES", ResumeMiddleware, MIDDLEWARE_ORDER
        )
        settings.setdefault_in_component_priority_dict("SPIDER_MIDDLEWARES", StartPacing, PACING_ORDER)
        _wire_pipeline(settings)
        _wire_handlers(settings)


def _leave_as_it_is(settings: BaseSettings) -> NoReturn:
    """Raise ``NotConfigured``: without a local store Scrapy works as it does without the add-on.

    A store that is elsewhere is warned of. A project without any has no files, or is told by
    ``FilesPipeline`` itself.
    """
    store = settings.get("FILES_STORE")
    reason = f"FILES_STORE={store!r} names no local directory"
    if store:
        raise NotConfigured(reason)
    logger.info("scrapy-streaming does nothing: %s", reason)
    raise NotConfigured


def _wire_pipeline(settings: BaseSettings) -> None:
    """Take the place of ``FilesPipeline``, or add ours where no pipeline takes ``file_urls``.

    One that the user switched off, by ``None``, stays off, and no other takes its place.
    """
    named = {load_object(path): order for path, order in settings.getdict("ITEM_PIPELINES").items()}
    files = [c for c in named if _is_files_pipeline(c)]
    on = [c for c in files if named[c] is not None]
    if FilesPipeline in on and StreamingFilesPipeline not in files:
        settings.replace_in_component_priority_dict("ITEM_PIPELINES", FilesPipeline, StreamingFilesPipeline)
        on.remove(FilesPipeline)
    elif not files:
        settings.setdefault_in_component_priority_dict("ITEM_PIPELINES", UninvitedFilesPipeline, 1)
    for other in on:
        if not issubclass(other, StreamingFilesPipeline):
            logger.warning(
                "%s stores files as Scrapy does: let it subclass scrapy_streaming.StreamingFilesPipeline "
                "to have them streamed",
                f"{other.__module__}.{other.__qualname__}",
            )


def _is_files_pipeline(component: Any) -> bool:
    """Whether a component takes ``file_urls``; it may be no class at all, but what makes one."""
    is_class = isinstance(component, type)
    return is_class and issubclass(component, FilesPipeline) and not issubclass(component, ImagesPipeline)


def _wire_handlers(settings: BaseSettings) -> None:
    """Wrap the handlers of http and https that bodies can be streamed from; others stay as they are.

    Those that the user named are kept. Scrapy's own are looked up when the crawl has begun.
    """
    named, kept = settings["DOWNLOAD_HANDLERS"], {}
    for scheme in schemes.SCHEMES if schemes.has_reactor(settings) else ():
        if not schemes.can_wrap(settings.getwithbase("DOWNLOAD_HANDLERS").get(scheme)):
            continue
        if scheme in named:
            kept[scheme] = named[scheme]
        # at least as high as where the user named his: a spider's settings, the command line
        named.set(scheme, schemes.OURS, max(named.getpriority(scheme) or 0, _ADDON_PRIORITY))
    settings.set(schemes.FALLBACK, {**kept, **settings.getdict(schemes.FALLBACK)}, "addon")
