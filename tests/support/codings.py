"""Bodies in a coding, as servers send them.

What may live here: encoders for the codings that the package decodes.
"""

from __future__ import annotations

from scrapy_streaming.storage import decoding


def zstd(data: bytes) -> bytes:
    return bytes(decoding._zstd().compress(data))
