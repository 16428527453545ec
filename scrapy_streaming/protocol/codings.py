"""Content codings: which codings a body has, and whether its coding is the content itself.

What may live here: rules of RFC 9110 §8.4. A coding that was not asked for is decoded before the bytes are
published, unless the file itself is in it: many mirrors label ``a.tar.gz`` as ``Content-Encoding: gzip``
(R34).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final
from urllib.parse import unquote, urlsplit

#: Every coding that can be decoded where its library is installed; RFC 9110 §8.4.1, RFC 7932, RFC 8878.
KNOWN: Final = frozenset({"gzip", "deflate", "br", "zstd"})

#: Codings of one body, at most; more are refused like an unknown one.
MOST: Final = 4

_ALIASES: Final = {"x-gzip": "gzip"}
#: Words that servers write there and that are no codings: upload formats, charsets, words for none.
_NO_CODINGS: Final = frozenset({"identity", "none", "binary", "utf-8", "utf8", "aws-chunked"})

_EXTENSIONS: Final = {
    "gzip": frozenset({".gz", ".tgz", ".taz", ".gzip", ".svgz", ".emz", ".wmz"}),
    "br": frozenset({".br"}),
    "zstd": frozenset({".zst", ".tzst", ".zstd"}),
    "deflate": frozenset({".zz", ".zlib"}),
}
_MEDIA_TYPES: Final = {
    "gzip": frozenset(
        {
            "application/gzip",
            "application/x-gzip",
            "application/x-gtar-compressed",
            "application/x-tgz",
            "application/x-compressed-tar",
            "application/x-tar-gz",
        }
    ),
    "br": frozenset({"application/x-brotli"}),
    "zstd": frozenset({"application/zstd", "application/x-zstd", "application/x-zstd-compressed-tar"}),
    "deflate": frozenset({"application/zlib"}),
}


def codings(content_encoding: str) -> tuple[str, ...]:
    """Return the codings that a Content-Encoding names, in the order they were applied.

    *content_encoding* is lower case. ``x-gzip`` is ``gzip`` (RFC 9110 §8.4.1.3); words that name no
    coding are left out.
    """
    named = (name.strip(" \t") for name in content_encoding.split(","))
    return tuple(_ALIASES.get(name, name) for name in named if name and name not in _NO_CODINGS)


def decodable(names: tuple[str, ...], here: frozenset[str]) -> bool:
    """Return whether all codings are among those that can be decoded *here*."""
    return len(names) <= MOST and here.issuperset(names)


def is_content(content_encoding: str, media_type: str | None, urls: Iterable[str]) -> bool:
    """Return whether the file itself is in the one coding, by its media type or a URL's extension.

    *urls* name the file: the first one requested, and the last.
    """
    named = codings(content_encoding)
    if len(named) != 1:
        return False
    (coding,) = named
    kind = (media_type or "").partition(";")[0].strip(" \t").lower()
    if kind in _MEDIA_TYPES.get(coding, ()):
        return True
    return any(_extension(url) in _EXTENSIONS.get(coding, ()) for url in urls)


def _extension(url: str) -> str:
    name = unquote(urlsplit(url).path).rpartition("/")[2]
    stem, dot, extension = name.rpartition(".")
    return f".{extension}".lower() if stem and dot else ""
