"""Where every component stands in Scrapy's settings.

What may live here: reading and writing of settings, at add-on priority, so that what the user sets wins.
"""

from __future__ import annotations

import logging
from typing import Any, Final

from scrapy.pipelines.files import FilesPipeline
from scrapy.pipelines.images import ImagesPipeline
from scrapy.settings import SETTINGS_PRIORITIES, BaseSettings
from scrapy.utils.misc import load_object

from scrapy_streaming import schemes
from scrapy_streaming.extension import StreamingExtension
from scrapy_streaming.middleware import ResumeMiddleware
from scrapy_streaming.pacing import StartPacing
from scrapy_streaming.pipeline import StreamingFilesPipeline, UninvitedFilesPipeline
from scrapy_streaming.redaction import clean_record

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)

MIDDLEWARE_ORDER: Final = 595
#: Nearest to the engine: what others add to ``start()`` counts, and what they keep does not.
PACING_ORDER: Final = 0
_ADDON_PRIORITY: Final = SETTINGS_PRIORITIES["addon"]


def wire(settings: BaseSettings) -> None:
    """Put every component in its place."""
    settings.setdefault_in_component_priority_dict("EXTENSIONS", StreamingExtension, 0)
    settings.setdefault_in_component_priority_dict(
        "DOWNLOADER_MIDDLEWARES", ResumeMiddleware, MIDDLEWARE_ORDER
    )
    settings.setdefault_in_component_priority_dict("SPIDER_MIDDLEWARES", StartPacing, PACING_ORDER)
    _wire_pipeline(settings)
    _wire_handlers(settings)


def _wire_pipeline(settings: BaseSettings) -> None:
    """Replace ``FilesPipeline``, or add the streaming pipeline where none takes ``file_urls``.

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

    Those that the user named are kept. Scrapy's own are read from the settings when the crawl has begun.
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
