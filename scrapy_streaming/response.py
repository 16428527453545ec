"""The response whose body is a part on disk."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from scrapy.http import Response

from scrapy_streaming.protocol.resume import Outcome
from scrapy_streaming.storage.blobs import Published
from scrapy_streaming.storage.finished import FinishedPart

Publisher = Callable[["StreamedResponse"], Awaitable[Published]]


class StreamedResponse(Response):
    """A response whose ``body`` is empty because its bytes are in ``part``.

    ``part`` has ``path``, ``length`` (bytes) and ``digest``; it is ``None`` when nothing was
    received (a 304, a refused answer). ``outcome`` is what the answer was judged to be,
    ``resumed_from`` how many bytes an earlier attempt had left. ``stamp`` is that of the blob, once
    the part is published.
    """

    attributes: tuple[str, ...] = (
        *Response.attributes, "outcome", "part", "resumed_from", "publisher"
    )  # fmt: skip

    def __init__(
        self,
        url: str,
        *args: Any,
        outcome: Outcome,
        part: FinishedPart | None = None,
        resumed_from: int = 0,
        publisher: Publisher | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(url, *args, **kwargs)
        self.outcome = outcome
        self.part = part
        self.resumed_from = resumed_from
        self.publisher = publisher
        self.stamp: bytes | None = None

    @classmethod
    def around(
        cls, response: Response, outcome: Outcome, part: FinishedPart | None = None, resumed_from: int = 0
    ) -> StreamedResponse:
        """Return *response* with its body taken over.

        Content-Encoding leaves the fields: the part keeps the raw octets and its state notes
        the coding, so nothing further up may try to decode an empty body.
        """
        headers = response.headers.copy()
        headers.pop("Content-Encoding", None)
        return cls(
            response.url,
            status=response.status,
            body=response.body,
            headers=headers,
            flags=[*response.flags, "streamed"],
            request=response.request,
            certificate=response.certificate,
            ip_address=response.ip_address,
            protocol=response.protocol,
            outcome=outcome,
            part=part,
            resumed_from=resumed_from,
        )

    async def publish(self) -> Published:
        """Publish the part by its content and record the completion; twice is once.

        Returns the blob's digest, its size in bytes and whether it was there before. Raises
        ``ValueError`` if there is no part, or the pipeline has taken charge of it.
        """
        if self.publisher is None or self.part is None:
            msg = f"{self} has no part to publish"
            raise ValueError(msg)
        return await self.publisher(self)
