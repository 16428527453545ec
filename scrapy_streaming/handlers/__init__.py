"""The download handlers.

What may live here: one module a library, which translates to and from ``download`` and decides nothing.
"""

from scrapy_streaming.handlers.http11 import StreamingDownloadHandler

__all__ = ["StreamingDownloadHandler"]
