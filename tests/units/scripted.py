"""A download handler whose answers a test writes: the second user of the port ``download``.

What may live here: a handler that translates a script, as ``handlers.http11`` translates Twisted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from scrapy import Request
from scrapy.http import Response
from scrapy.utils.defer import maybe_deferred_to_future

from scrapy_streaming.context import context_of
from scrapy_streaming.download import Download
from scrapy_streaming.exceptions import StreamingError
from scrapy_streaming.protocol.answers import PassOn
from scrapy_streaming.protocol.parts import BodyEnd
from scrapy_streaming.runtime.crawl import Runtime


@dataclass
class Script:
    """One answer: its head, the pieces of its body, and how it ends."""

    status: int = 200
    fields: dict[str, str] = field(default_factory=dict)
    pieces: Sequence[bytes] = ()
    end: BodyEnd = BodyEnd.FRAMED
    fails: StreamingError | None = None


class ScriptedHandler:
    """Gives each request the next script; ``waits`` counts the pauses, ``aborted`` the sources closed."""

    def __init__(self, runtime: Runtime, *scripts: Script) -> None:
        self.waits = 0
        self.aborted = 0
        self._runtime = runtime
        self._scripts = list(scripts)

    async def download_request(self, request: Request) -> Response:
        script, context = self._scripts.pop(0), context_of(request)
        assert context is not None
        download = Download(self._runtime, request, context)
        fields = {name.lower(): [value] for name, value in script.fields.items()}
        length = script.fields.get("Content-Length")
        response = Response(request.url, status=script.status, headers=script.fields, request=request)
        if isinstance(download.judge(script.status, fields, length and int(length)), PassOn):
            return response.replace(body=b"".join(script.pieces))
        if download.begin(self._abort):
            for piece in script.pieces:
                ready = download.write(piece)
                if ready is not None:
                    self.waits += 1
                    await maybe_deferred_to_future(ready)
            if script.fails is not None:
                download.fail(script.fails)
            download.finish(script.end)
        return await download.result(response)

    def _abort(self) -> None:
        self.aborted += 1
