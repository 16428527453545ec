"""The download handlers: one module a library, each only translates to and from ``download``."""

from scrapy_streaming.handlers.http11 import StreamingDownloadHandler

__all__ = ["StreamingDownloadHandler"]
