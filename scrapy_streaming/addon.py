"""The add-on: ``ADDONS = {"scrapy_streaming.Addon": 300}`` is all that a project needs.

What may live here: checks of the settings before the crawl. Switched off it imports none of the components:
Scrapy starts as fast as without it.
"""

from __future__ import annotations

import logging
import os
from typing import NoReturn

from scrapy.exceptions import NotConfigured
from scrapy.settings import BaseSettings

from scrapy_streaming.exceptions import SettingError, StoreError
from scrapy_streaming.redaction import clean, clean_record
from scrapy_streaming.settings import StreamingSettings

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)


class Addon:
    """Puts every component in its place, at add-on priority."""

    @classmethod
    def update_pre_crawler_settings(cls, settings: BaseSettings) -> None:
        """Stop with one line if a setting cannot be read, or the store cannot be used."""
        try:
            loaded = StreamingSettings.load(settings, os.environ)
            if loaded.enabled:
                from scrapy_streaming.storage.store import check_store

                check_store(loaded)
        except (SettingError, StoreError) as error:
            msg = f"scrapy-streaming: {clean(error)}"
            raise SystemExit(msg) from None

    def update_settings(self, settings: BaseSettings) -> None:
        """Wire the components; raise ``NotConfigured`` when there is nothing to wire."""
        loaded = StreamingSettings.load(settings, os.environ)
        if not loaded.enabled:
            raise NotConfigured  # as the user wants it: nothing to log
        if loaded.store is None:
            _leave_as_it_is(settings)
        from scrapy_streaming.wiring import wire

        wire(settings)


def _leave_as_it_is(settings: BaseSettings) -> NoReturn:
    """Raise ``NotConfigured``: without a local store Scrapy works as it does without the add-on.

    A store that is elsewhere is warned of. A project without any has no files, or gets a line of
    ``FilesPipeline`` itself.
    """
    store = settings.get("FILES_STORE")
    reason = f"FILES_STORE={store!r} names no local directory"
    if store:
        raise NotConfigured(reason)
    logger.info("scrapy-streaming does nothing: %s", reason)
    raise NotConfigured
