"""Files for Scrapy: streamed to disk, resumed after a break, published by content.

What may live here: the names that users import from the package, and no import of its modules. ``Addon`` is
what goes into ``ADDONS``; everything else is loaded when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scrapy_streaming.addon import Addon
    from scrapy_streaming.pipeline import StreamingFilesPipeline
    from scrapy_streaming.response import StreamedResponse

__version__ = "0.1.0"
__all__ = ["Addon", "StreamedResponse", "StreamingFilesPipeline", "__version__"]

_HOME = {
    "Addon": "scrapy_streaming.addon",
    "StreamedResponse": "scrapy_streaming.response",
    "StreamingFilesPipeline": "scrapy_streaming.pipeline",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
