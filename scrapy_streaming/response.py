"""The response whose body is a part on disk, read only when ``body`` is asked for.

What may live here: Scrapy's response classes over stored bytes. Nothing here decides or stores.
"""

from __future__ import annotations

import inspect
import logging
import os
import tempfile
import weakref
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final, cast

from scrapy.http import Response, TextResponse
from scrapy.responsetypes import responsetypes
from scrapy.utils.asyncio import run_in_thread

from scrapy_streaming.protocol.answers import Outcome, PassOn
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.protocol.reasons import Reason
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.redaction import clean_record
from scrapy_streaming.storage.blobs import Published
from scrapy_streaming.storage.complete_part import READ_SIZE, CompletePart, small_part

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)

Publisher = Callable[["StreamedResponse"], Awaitable[Published]]

#: Modules of Scrapy that take only the length of a body: of the statistics, of AutoThrottle's log line.
_COUNTING: Final = frozenset({"scrapy.downloadermiddlewares.stats", "scrapy.extensions.throttle"})
#: The one that adds up how much memory the bodies take that wait for spiders.
_HOLDING: Final = "scrapy.core.scraper"
#: The one that searches for a refresh and a base URL in the first 4096 characters of a page.
_SKIMMING: Final = "scrapy.utils.response"
#: Bytes that are enough for it, in any encoding.
_PAGE_HEAD: Final = 64 << 10
#: Bytes from which Scrapy infers the class of a response whose fields and URL do not give it.
SNIFFED: Final = 5000


class ReceivedPart:
    """The bytes behind a response: ``length`` (bytes), ``digest``, and a file to read at ``path``.

    All copies of a response share one. ``finished`` is what storage takes. ``warn_size``: above so
    many bytes there is a warning when they are read into memory, 0 for none. ``stored`` is the blob
    once they are published: then the part goes away.
    """

    def __init__(self, finished: CompletePart) -> None:
        self.finished = finished
        self.warn_size = 0
        self.stored: Path | None = None
        self._read: bytes | None = None
        self._written: Path | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.length} bytes {self.digest}>"

    @property
    def length(self) -> int:
        """How many bytes there are."""
        return self.finished.length

    @property
    def digest(self) -> Digest:
        """Their SHA-256."""
        return self.finished.digest

    @property
    def path(self) -> Path:
        """The file that has the bytes; for a small body it is written when this is asked for.

        It is there as long as the hook or the callback runs that was given the response, and is not
        to be changed.
        """
        path = self.stored or self.finished.path or self._written
        if path is None:
            path = self._written = self._write()
        return path

    def _write(self) -> Path:
        fd, name = tempfile.mkstemp(prefix="scrapy-streaming-")
        weakref.finalize(self, Path(name).unlink, missing_ok=True)
        with os.fdopen(fd, "wb") as file:
            for piece in self.pieces():
                file.write(piece)
        return Path(name)

    def pieces(self) -> Iterator[bytes]:
        """Give the content, piece by piece, as it is or will be stored (blocks).

        The one place where the octets of a part become what hooks read.
        """
        if self.finished.data is not None:
            yield self.finished.data
            return
        with self.path.open("rb") as file:
            while piece := file.read(READ_SIZE):
                yield piece

    def head(self, size: int) -> bytes:
        """Return the first *size* bytes, or all there are (blocks)."""
        head = b""
        for piece in self.pieces():
            head += piece
            if len(head) >= size:
                break
        return head[:size]

    def read(self) -> bytes:
        """Return the whole content, and keep it, as Scrapy keeps a body (blocks)."""
        if self._read is None:
            if self.finished.data is None and 0 < self.warn_size < self.length:
                logger.warning(
                    "response.body reads %d bytes into memory, above DOWNLOAD_WARNSIZE=%d: %s; "
                    "the file response.part.path can be read in pieces",
                    self.length, self.warn_size, self.finished.state.url,
                )  # fmt: skip
            self._read = b"".join(self.pieces())
        return self._read


class StreamedResponse(Response):
    """A response whose ``body`` is read from its part when it is asked for.

    It also is what Scrapy makes of such a response: ``HtmlResponse``, ``XmlResponse`` and so on.
    ``part`` has ``path``, ``length`` (bytes) and ``digest``; it is ``None`` when nothing was received
    (a 304, a refused answer). ``confirmed`` are the stored bytes that a 304 speaks of. ``outcome`` is
    what the answer was judged to be, ``resumed_from`` how many bytes an earlier attempt had left.
    """

    def __init__(
        self,
        url: str,
        *args: Any,
        outcome: Outcome,
        part: ReceivedPart | None = None,
        confirmed: ReceivedPart | None = None,
        resumed_from: int = 0,
        publisher: Publisher | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(url, *args, **kwargs)
        self.outcome = outcome
        self.part = part
        self.confirmed = confirmed
        self.resumed_from = resumed_from
        self.publisher = publisher

    @classmethod
    def around(
        cls,
        response: Response,
        outcome: Outcome,
        part: CompletePart | None = None,
        resumed_from: int = 0,
        *,
        kind: type[Response] | None = None,
    ) -> StreamedResponse:
        """Return *response* with its body taken over, as a variant of *kind* or of its own class.

        Content-Encoding leaves the fields: the part keeps the raw octets and its state notes
        the coding, so nothing further up may try to decode. With a part it is a 200 whose fields
        describe all of it, however the part came together.
        """
        headers = response.headers.copy()
        headers.pop("Content-Encoding", None)
        status = response.status
        if part is not None and status not in (200, 203):
            headers.pop("Content-Range", None)
            headers["Content-Length"] = str(part.length)
            if status != 206 and part.state.media_type is not None:  # a 416 gives the type of its own body
                headers["Content-Type"] = part.state.media_type
            status = 200
        return _variant(kind or type(response))(
            response.url,
            status=status,
            body=response.body if part is None else b"",
            headers=headers,
            flags=[*(flag for flag in response.flags if flag != "streamed"), "streamed"],
            request=response.request,
            certificate=response.certificate,
            ip_address=response.ip_address,
            protocol=response.protocol,
            outcome=outcome,
            part=None if part is None else ReceivedPart(part),
            resumed_from=resumed_from,
        )

    @classmethod
    async def received(
        cls, response: Response, outcome: Outcome, part: CompletePart, resumed_from: int = 0
    ) -> StreamedResponse:
        """Return *response* with *part*, of the class that Scrapy gives a response with these bytes."""
        kind = responsetypes.from_args(headers=response.headers, url=response.url)
        if kind is Response:
            content = ReceivedPart(part)
            head = await run_in_thread(content.head, SNIFFED) if part.data is None else part.data[:SNIFFED]
            kind = responsetypes.from_body(head)
        return cls.around(response, outcome, part, resumed_from, kind=kind)

    @property
    def content(self) -> ReceivedPart | None:
        """The bytes that this response stands for: received now, or stored before and confirmed."""
        return self.part or self.confirmed

    @property
    def body(self) -> bytes:
        """The bytes, read from disk when this is asked for.

        Scrapy itself takes the length of every body. It gets something of that length, and nothing
        is read: the bytes that came over the wire for its statistics, none for the memory in use.
        """
        content = self.content
        if content is None:
            return super().body
        if content.finished.data is None:
            caller = _caller()
            if caller in _COUNTING:
                return cast("bytes", range(self.part.length - self.resumed_from if self.part else 0))
            if caller == _HOLDING:
                return b""
        return content.read()

    def replace(self, *args: Any, cls: type[Response] | None = None, **kwargs: Any) -> Any:
        """Return a copy with some attributes changed; without *body* it shares the part, and reads nothing.

        With *body* it is another representation: the outcome is ``transformed``, and no validator
        belongs to it.
        """
        for name in Response.attributes:
            if name != "body":
                kwargs.setdefault(name, getattr(self, name))
        kind = _variant(cls or type(self))
        kwargs |= {"publisher": self.publisher, "outcome": self.outcome}
        if "body" not in kwargs:
            kwargs |= {"part": self.part, "confirmed": self.confirmed, "resumed_from": self.resumed_from}
            return kind(*args, body=b"" if self.content else super().body, **kwargs)
        made = kind(*args, **kwargs)
        made.outcome = PassOn(Reason.TRANSFORMED)
        made.part = ReceivedPart(small_part(PartState(made.url, Validators()), made.body))
        return made

    def to_dict(self) -> dict[str, Any]:
        """Return what Scrapy's own response would."""
        values = super().to_dict()
        kind = next(each for each in type(self).__mro__ if not issubclass(each, StreamedResponse))
        values.pop("_class", None)
        return values if kind is Response else {**values, "_class": f"{kind.__module__}.{kind.__qualname__}"}

    async def publish(self) -> Published:
        """Publish the part by its content and record the completion; twice is once.

        Returns the blob's digest, its size in bytes and whether it was there before. Raises
        ``ValueError`` if there is no part, or the pipeline has taken charge of it.
        """
        if self.publisher is None or self.part is None:
            msg = f"{self} has no part to publish"
            raise ValueError(msg)
        return await self.publisher(self)


class StreamedTextResponse(StreamedResponse, TextResponse):
    """One of text: ``text``, ``encoding``, ``css`` and the rest read the part when asked."""

    def __init__(self, *args: Any, encoding: str | None = None, **kwargs: Any) -> None:
        self._given_encoding = encoding
        super().__init__(*args, encoding=encoding, **kwargs)

    @property
    def text(self) -> str:
        """The text; Scrapy's search for a refresh gets the beginning only."""
        return self._page_head().text if self._skimmed(_caller()) else super().text

    @property
    def encoding(self) -> str:
        """The encoding, by the fields or the bytes."""
        return self._page_head().encoding if self._skimmed(_caller()) else super().encoding

    def _skimmed(self, caller: str) -> bool:
        content = self.content
        return caller == _SKIMMING and content is not None and content.length > _PAGE_HEAD

    def _page_head(self) -> TextResponse:
        head = self.content.head(_PAGE_HEAD) if self.content else b""
        return TextResponse(self.url, headers=self.headers, body=head, encoding=self._given_encoding)

    def replace(self, *args: Any, cls: type[Response] | None = None, **kwargs: Any) -> Any:
        """Return a copy as ``StreamedResponse`` does, in the same encoding."""
        kwargs.setdefault("encoding", self.encoding if "body" in kwargs else self._given_encoding)
        return super().replace(*args, cls=cls, **kwargs)


_VARIANTS: dict[type, type[StreamedResponse]] = {
    Response: StreamedResponse,
    TextResponse: StreamedTextResponse,
}


def _variant(kind: type[Response]) -> type[StreamedResponse]:
    """Return the streamed class that also is a *kind*."""
    if issubclass(kind, StreamedResponse):
        return kind
    if kind not in _VARIANTS:
        base = StreamedTextResponse if issubclass(kind, TextResponse) else StreamedResponse
        _VARIANTS[kind] = type(f"Streamed{kind.__name__}", (base, kind), {"__module__": __name__})
    return _VARIANTS[kind]


def _caller() -> str:
    """Return the name of the module that reads the property this is called in."""
    frame = inspect.currentframe()
    for _ in range(2):
        frame = frame and frame.f_back
    return "" if frame is None else str(frame.f_globals.get("__name__"))
