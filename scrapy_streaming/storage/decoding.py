"""Decode content codings as a stream, with bounded memory (R34, E4).

What may live here: decoders, from bytes to bytes. gzip and deflate come with Python, br and zstd with the
libraries that Scrapy uses for them.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, Final, Protocol

from scrapy_streaming.exceptions import Undecodable

#: Bytes that a decoder returns at a time: a few coded bytes may decode to gigabytes.
STEP: Final = 64 << 10
#: The largest window of zstd as a content coding is 8 MiB (RFC 9659 §3).
ZSTD_WINDOW_LOG: Final = 23
#: Bytes that a decoder is given at a time: it copies those after the end of a member.
PIECE: Final = 16 << 10
#: Empty members or frames in a row, at most: an endless body of them never reaches a limit on its size.
EMPTY: Final = 1000
#: The first bytes of content in a coding (RFC 1952 §2.3.1, RFC 8878 §3.1.1).
MAGIC: Final = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd"}


class _Decoder(Protocol):
    """One stream of one coding."""

    @property
    def ended(self) -> bool:
        """Whether the stream has ended."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield what *data* decodes to, about ``STEP`` bytes at a time; raise ``Undecodable``."""


class _Inflate:
    """gzip (any number of members, RFC 1952 §2.2) and deflate (with or without zlib's header).

    Bytes after the end that do not begin another member are ignored, as other decoders do: the checksum
    of the bytes before them was right.
    """

    def __init__(self, *, gzip: bool) -> None:
        self.ended = False
        self._empty = _Empty()
        self._gzip = gzip
        self._head = b""
        self._inner: Any = zlib.decompressobj(31) if gzip else None

    def feed(self, data: bytes) -> Iterator[bytes]:
        if self._inner is None:
            data = self._head + data
            self._head = data if len(data) < 2 else b""
            if self._head:
                return
            self._inner = zlib.decompressobj(15 if _has_zlib_header(data) else -15)
        while data:
            if self._inner.eof:
                if not self._gzip or not MAGIC["gzip"].startswith(data[:2]):  # not another member
                    return
                self._inner, self.ended = zlib.decompressobj(31), False
            out = self._step(data)
            data = self._inner.unconsumed_tail or self._inner.unused_data
            yield out
            self._empty.count(out, ended=self.ended)
            while len(out) == STEP and not data and not self.ended:  # zlib still has output that did not fit
                out = self._step(b"")
                yield out

    def _step(self, data: bytes) -> bytes:
        """Return at most ``STEP`` bytes of what *data*, and the input before it, decodes to."""
        try:
            out: bytes = self._inner.decompress(data, STEP)
        except zlib.error as error:
            raise Undecodable(str(error)) from error
        self.ended = self._inner.eof
        return out


class _Empty:
    """Counts empty members or frames in a row."""

    def __init__(self) -> None:
        self._number = 0

    def count(self, out: bytes, *, ended: bool) -> None:
        """Count a member that ended without output; raise ``Undecodable`` beyond ``EMPTY``."""
        if out:
            self._number = 0
        elif ended:
            self._number += 1
        if self._number > EMPTY:
            msg = f"more than {EMPTY} members or frames in a row are empty"
            raise Undecodable(msg)


def _has_zlib_header(data: bytes) -> bool:
    """Return whether *data* begins with a header of RFC 1950 §2.2; some servers send raw RFC 1951 instead."""
    return data[0] & 0x0F == 8 and (data[0] << 8 | data[1]) % 31 == 0


class _Brotli:
    """br (RFC 7932)."""

    def __init__(self) -> None:
        self._library: Any = _brotli()
        self._inner: Any = self._library.Decompressor()

    @property
    def ended(self) -> bool:
        return bool(self._inner.is_finished())

    def feed(self, data: bytes) -> Iterator[bytes]:
        try:
            if data and self.ended:
                msg = "there are bytes after the end of the br stream"
                raise Undecodable(msg)
            while True:
                out = self._inner.process(data, output_buffer_limit=STEP)
                data = b""
                if out:
                    yield out
                elif self.ended or self._inner.can_accept_more_data():
                    return
        except self._library.error as error:
            raise Undecodable(str(error) or "br") from error


class _Zstd:
    """zstd (RFC 8878), of any number of frames."""

    def __init__(self) -> None:
        self.ended = False
        self._empty = _Empty()
        self._library: Any = _zstd()
        self._inner: Any = self._new()

    def _new(self) -> Any:
        limit = {self._library.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG}
        return self._library.ZstdDecompressor(options=limit)

    def feed(self, data: bytes) -> Iterator[bytes]:
        try:
            while data or not (self._inner.needs_input or self._inner.eof):
                if self._inner.eof:
                    self._inner = self._new()
                out = self._inner.decompress(data, STEP)
                data = self._inner.unused_data if self._inner.eof else b""
                self.ended = self._inner.eof
                self._empty.count(out, ended=self.ended)
                if out:
                    yield out
        except self._library.ZstdError as error:
            raise Undecodable(str(error)) from error


@cache
def _brotli() -> Any:
    """Return a library for br that can limit its output per call, ``None`` if none is installed."""
    library = _first("brotli", "brotlicffi")
    can_bound = library is not None and hasattr(library.Decompressor, "can_accept_more_data")
    return library if can_bound else None


@cache
def _zstd() -> Any:
    """Return a library for zstd, ``None`` if none is installed."""
    return _first("compression.zstd", "backports.zstd")


def _first(*names: str) -> Any:
    """Return the first of the modules that is installed, else ``None``."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


_DECODERS: Final[dict[str, Callable[[], _Decoder]]] = {
    "gzip": lambda: _Inflate(gzip=True),
    "deflate": lambda: _Inflate(gzip=False),
    "br": _Brotli,
    "zstd": _Zstd,
}


@cache
def decodable() -> frozenset[str]:
    """Return the codings for which a decoder is installed."""
    missing = {name for name, library in (("br", _brotli()), ("zstd", _zstd())) if library is None}
    return frozenset(_DECODERS) - missing


def decoded(chunks: Iterable[bytes], codings: tuple[str, ...]) -> Iterator[bytes]:
    """Yield what *chunks* decode to; *codings* are in the order in which they were applied.

    Raises ``Undecodable`` for bytes that are not in these codings, or that end too early.
    """
    for coding in reversed(codings):
        chunks = _through(_DECODERS[coding](), coding, chunks)
    yield from chunks


def _through(decoder: _Decoder, coding: str, chunks: Iterable[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        for at in range(0, len(chunk), PIECE):
            yield from decoder.feed(chunk[at : at + PIECE])
    if not decoder.ended:
        msg = f"the body ends before its {coding} stream does"
        raise Undecodable(msg)


def coded_twice(chunks: Iterable[bytes], coding: str) -> bool:
    """Return whether *chunks* decode to bytes that are in *coding* again: the content was coded twice."""
    if coding not in MAGIC or coding not in decodable():
        return False
    head = b""
    try:
        for piece in decoded(chunks, (coding,)):
            head += piece
            if len(head) >= len(MAGIC[coding]):
                break
    except Undecodable:
        return False
    return head.startswith(MAGIC[coding])
