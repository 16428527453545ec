"""What came: every library's octets, judged before they are written; never half a file."""

from __future__ import annotations

import asyncio
import gzip
import io
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import urllib3
from adapter_kit import BODY, KIB, LIBRARIES, ask, client_of, decide, once, ranges, sha, whole
from scrapy import Request
from scrapy.http import HtmlResponse, Response
from support.origin import Answer, Origin, cut, honest, partial

from scrapy_streaming import integration
from scrapy_streaming.exceptions import (
    AnswerRefused,
    BodyConsumed,
    BodyIncomplete,
    EndUnmarked,
    IntegrityError,
    StreamingError,
    WriteFailed,
)
from scrapy_streaming.integration.answers import answer_of
from scrapy_streaming.protocol.answers import Replace
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.protocol.reasons import Reason
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.response import StreamedResponse
from scrapy_streaming.storage.complete_part import small_part

AT = 128 * KIB + 77  # no whole number of pieces
FIELDS = {
    "ETag": '"v1"',
    "Last-Modified": "Tue, 02 Jan 2024 03:04:05 GMT",
    "Date": "Wed, 03 Jan 2024 03:04:05 GMT",
}


def files(part: Path) -> list[str]:
    return sorted(path.name for path in part.parent.iterdir())


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_body_is_written_whole_and_measured(origin: Origin, part: Path, library: str) -> None:
    seen: list[tuple[int, int | None]] = []
    metrics = once(library, origin.put("/a", BODY), part, progress_callback=lambda *said: seen.append(said))
    assert part.read_bytes() == BODY
    assert (metrics.bytes_written, metrics.resumed_from_bytes) == (len(BODY), 0)
    assert metrics.sha256_hex == sha(BODY)
    assert metrics.elapsed_ms > 0
    assert metrics.fsync_ms >= 0
    assert metrics.avg_write_mibps > 0
    assert seen[-1] == (len(BODY), len(BODY))
    assert [had for had, _ in seen] == sorted({had for had, _ in seen})
    assert files(part) == ["file.part", "file.part.json"]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("end", ["reset", "close"])
def test_a_broken_body_is_kept_and_gone_on_with(origin: Origin, part: Path, library: str, end: str) -> None:
    """R31, R61, R10."""
    url = origin.put("/a", BODY, cut(AT, end))
    with pytest.raises(BodyIncomplete) as broken:
        once(library, url, part)
    assert broken.value.kept == AT
    metrics = once(library, url, part)
    assert (metrics.resumed_from_bytes, metrics.bytes_written) == (AT, len(BODY) - AT)
    assert metrics.sha256_hex == sha(part.read_bytes()) == sha(BODY)
    assert ranges(origin) == ["", f"bytes={AT}-"]


@pytest.mark.parametrize("library", LIBRARIES)
def test_chunks_end_where_the_last_one_says(origin: Origin, part: Path, library: str) -> None:
    """R32."""
    url = origin.put("/a", BODY, cut(AT, "close", chunked=True), default=chunked)
    with pytest.raises(BodyIncomplete):
        once(library, url, part)
    assert once(library, url, part).sha256_hex == sha(BODY)


def chunked(asked: Any, resource: Any) -> Answer:
    return honest(asked, resource, chunked=True)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_changed_file_takes_the_parts_place(origin: Origin, part: Path, library: str) -> None:
    """R28."""
    url = origin.put("/a", BODY, cut(AT))
    with pytest.raises(BodyIncomplete):
        once(library, url, part)
    other = BODY[::-1]
    origin.put("/a", other)
    metrics = once(library, url, part)
    assert (metrics.resumed_from_bytes, metrics.sha256_hex) == (0, sha(other))
    assert part.read_bytes() == other
    assert files(part) == ["file.part", "file.part.json"]


@pytest.mark.parametrize("moved", [False, True])
def test_a_crash_while_a_part_is_replaced_loses_nothing(
    origin: Origin, part: Path, moved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the new bytes are in the old one's place, or right after: one sidecar is right."""
    url, other, rename = origin.put("/a", BODY, cut(AT)), BODY[::-1], os.rename
    with pytest.raises(BodyIncomplete):
        once("httpx", url, part)
    origin.put("/a", other)

    def dies(source: Any, target: Any, **how: Any) -> None:
        if target != part.name:
            rename(source, target, **how)
            return
        if moved:
            rename(source, target, **how)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", dies)
        with pytest.raises(KeyboardInterrupt):
            once("httpx", url, part)
    assert decide(part).mode == "cached"
    assert part.read_bytes() == other
    assert files(part) == ["file.part", "file.part.json"]


def test_the_old_part_stays_until_a_longer_one_is_there(origin: Origin, part: Path) -> None:
    """R30: what came instead broke off earlier."""
    url = origin.put("/a", BODY, cut(AT), cut(AT // 2, etag='"other"'))
    origin.put("/a", BODY, cut(AT), lambda a, r: Answer(200, FIELDS, b"<html>" * 9999, end="reset", cut=5000))
    for _ in range(2):
        with pytest.raises(BodyIncomplete):
            once("httpx", url, part)
    assert part.read_bytes() == BODY[:AT]
    assert once("httpx", url, part).resumed_from_bytes == AT


#: Answers to a range that must not be joined; the reason, and whether the part is gone.
REFUSED = {
    "changed": (lambda a, r: partial(r, AT, fields=FIELDS | span(AT)), "changed-206", True),
    "no-content-range": (lambda a, r: Answer(206, r.fields(), BODY[AT:]), "bad-content-range", False),
    "gap": (lambda a, r: partial(r, AT + 1), "range-start", False),
    "multipart": (
        lambda a, r: Answer(206, r.fields() | {"Content-Type": "multipart/byteranges; boundary=x"}, b"--x--"),
        "multipart-206", False,
    ),
    "coded": (
        lambda a, r: partial(r, AT, fields=r.fields() | span(AT) | {"Content-Encoding": "gzip"}),
        "recoded-206", False,
    ),
    "shrunk": (lambda a, r: Answer(416, {"Content-Range": "bytes */10"}), "shrunk", True),
    "bare-416": (lambda a, r: Answer(416, {}), "bare-416", False),
    "unasked-304": (lambda a, r: Answer(304, r.fields()), "unasked-304", False),
    "range-error": (lambda a, r: Answer(501, {}), "range-error", False),
    "contradicted": (
        lambda a, r: partial(r, AT, chunked=True, body=BODY[AT:] + b"more"), "range-contradicted", False,
    ),
    "slice-digest": (
        lambda a, r: partial(
            r, AT, fields=r.fields() | span(AT) | {"Content-Digest": f"sha-256=:{'A' * 43}=:"}
        ),
        "slice-digest-mismatch", False,
    ),
}  # fmt: skip


def span(first: int) -> dict[str, str]:
    return {"Content-Range": f"bytes {first}-{len(BODY) - 1}/{len(BODY)}"}


#: Those libraries that give errors in a way of their own: urllib raises, and keeps no request.
OTHERS = [("changed", "requests"), ("changed", "urllib"), ("bare-416", "urllib"), ("unasked-304", "urllib")]


@pytest.mark.parametrize(("case", "library"), [*((case, "httpx") for case in REFUSED), *OTHERS])
def test_what_must_not_be_joined_is_refused_by_name(
    origin: Origin, part: Path, case: str, library: str
) -> None:
    """R13, R15, R21, R22, R24, R46, R51, R53, R55, R64, R74: and the next decision avoids it."""
    answer, reason, gone = REFUSED[case]
    url = origin.put("/a", BODY, cut(AT), answer, default=answer)
    with pytest.raises(BodyIncomplete):
        once(library, url, part)
    with pytest.raises(AnswerRefused) as refused:
        once(library, url, part)
    assert refused.value.reason == reason
    assert ranges(origin)[-1] == f"bytes={AT}-"
    assert part.exists() != gone
    if not gone:
        assert part.read_bytes() == BODY[:AT]
    assert decide(part).mode == "fresh"
    origin.put("/a", BODY)
    assert whole(library, url, part).sha256_hex == sha(BODY)


def test_a_range_that_nobody_asked_for_is_refused(origin: Origin, part: Path) -> None:
    """R25."""
    url = origin.put("/a", BODY, default=lambda a, r: partial(r, 5))
    with pytest.raises(AnswerRefused) as refused:
        once("httpx", url, part)
    assert refused.value.reason == "unsolicited-206"
    assert not part.exists()


@pytest.mark.parametrize("status", [204, 301, 404, 503])
def test_a_status_of_no_file_is_refused(origin: Origin, part: Path, status: int) -> None:
    url = origin.put("/a", BODY, default=lambda a, r: Answer(status, {}))
    with pytest.raises(AnswerRefused) as refused:
        once("httpx", url, part)
    assert refused.value.reason == f"bad-status-{status}"
    assert not part.exists()


def test_a_whole_part_is_confirmed_by_a_304(
    origin: Origin, part: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R49."""
    url = origin.put("/a", BODY)
    whole("httpx", url, part)
    monkeypatch.setenv("SCRAPY_STREAMING_REVALIDATE", "always")
    for library in ("httpx", "requests", "urllib"):
        metrics = once(library, url, part)
        assert (metrics.bytes_written, metrics.resumed_from_bytes) == (0, len(BODY))
        assert metrics.sha256_hex == sha(BODY)
        assert origin.requests[-1].status == 304


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_body_without_a_marked_end_is_never_whole_at_once(origin: Origin, part: Path, library: str) -> None:
    """R33: the second answer, with the same bytes, is; or a 416 that says so."""
    bare = Answer(200, {}, BODY[:AT], length=None, end="close")
    url = origin.put("/a", BODY, default=lambda a, r: bare)
    with pytest.raises(EndUnmarked):
        once(library, url, part)
    assert decide(part).headers["Range"] == f"bytes={AT}-"
    assert once(library, url, part).sha256_hex == sha(BODY[:AT])
    assert decide(part).mode == "cached"


def test_a_416_says_that_nothing_lies_behind_an_unmarked_end(origin: Origin, part: Path) -> None:
    bare = Answer(200, FIELDS, BODY[:AT], length=None, end="close")
    url = origin.put("/a", BODY, bare, default=lambda a, r: Answer(416, {"Content-Range": f"bytes */{AT}"}))
    with pytest.raises(EndUnmarked):
        once("requests", url, part)
    assert once("requests", url, part).bytes_written == 0
    assert decide(part).mode == "cached"


@pytest.mark.parametrize("library", LIBRARIES)
def test_octets_are_kept_as_they_came(origin: Origin, part: Path, tmp_path: Path, library: str) -> None:
    """R34: no library's decoding comes before the part; what is published is decoded."""
    coded = gzip.compress(BODY)
    url = origin.put(
        "/a", BODY, default=lambda a, r: Answer(200, FIELDS | {"Content-Encoding": "gzip"}, coded)
    )
    metrics = once(library, url, part)
    assert part.read_bytes() == coded
    assert metrics.sha256_hex == sha(coded)
    artifact = integration.try_streaming_finalization(part, store=tmp_path / "store", expected=sha(BODY))
    assert artifact is not None
    assert artifact.digest == f"sha256:{sha(BODY)}"


def test_a_digest_of_the_server_is_compared(origin: Origin, part: Path) -> None:
    """R63."""
    wrong = f"sha-256=:{'A' * 43}=:"
    url = origin.put("/a", BODY, default=lambda a, r: Answer(200, FIELDS | {"Repr-Digest": wrong}, BODY))
    with pytest.raises(IntegrityError):
        once("httpx", url, part)
    assert not part.exists()


def test_a_limit_is_kept(origin: Origin, part: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRAPY_STREAMING_MAX_SIZE", str(AT))
    with pytest.raises(AnswerRefused) as refused:
        once("httpx", origin.put("/a", BODY), part)
    assert refused.value.reason == "too-large"


# -- responses that cannot be used -----------------------------------------------------------


def read_somewhat(library: str, response: Any) -> None:
    match library:
        case "httpx":
            next(response.iter_raw(10))
        case "requests":
            next(response.iter_content(10))
        case _:
            response.read(10)


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("much", ["some", "all"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_body_that_was_read_is_refused(
    origin: Origin, part: Path, library: str, much: str, framing: str
) -> None:
    url = origin.put("/a", BODY, default=chunked if framing == "chunked" else honest)
    response = ask(library, url)
    if much == "some":
        read_somewhat(library, response)
    else:
        _ = response.content if library == "requests" else response.read()
    with pytest.raises(BodyConsumed):
        integration.try_streaming_io(response, part)
    assert not part.exists()


@pytest.mark.parametrize("library", ["httpx", "requests", "urllib3"])
def test_a_body_that_the_library_buffered_is_refused(origin: Origin, part: Path, library: str) -> None:
    url = origin.put("/a", BODY)
    client = client_of(library)
    response = client.request("GET", url) if library == "urllib3" else client.get(url)
    with pytest.raises(BodyConsumed, match="stream"):
        integration.try_streaming_io(response, part)
    assert not part.exists()


def test_httpx2_is_taken_alike(origin: Origin, part: Path, tmp_path: Path) -> None:
    import httpx2

    url = origin.put("/a", BODY, cut(AT), cut(AT))
    with httpx2.Client(trust_env=False) as client:
        for _ in range(2):
            with (
                client.stream("GET", url, headers=decide(part).headers) as response,
                suppress(BodyIncomplete),
            ):
                integration.try_streaming_io(response, part)
        assert decide(part).resume_byte_offset == 2 * AT
        with client.stream("GET", url, headers=decide(part).headers) as response:
            metrics = integration.try_streaming_io(response, part)
        assert metrics is not None
        assert metrics.sha256_hex == sha(BODY)
        with pytest.raises(BodyConsumed):
            integration.try_streaming_io(client.get(url), part)
        entry = integration.download(url, store=tmp_path / "store", client=client)
        assert entry is not None
        assert entry["checksum"] == sha(BODY)


def test_an_empty_file_is_one(origin: Origin, part: Path) -> None:
    """R36."""
    url = origin.put("/a", b"")
    for number, library in enumerate(LIBRARIES):
        path = part.with_name(f"{number}.part")
        assert once(library, url, path).sha256_hex == sha(b"")
        assert path.read_bytes() == b""


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_answer_of_another_url_leaves_the_part(origin: Origin, part: Path, library: str) -> None:
    url = origin.put("/a", BODY, cut(AT))
    with pytest.raises(BodyIncomplete):
        once(library, url, part)
    with pytest.raises(AnswerRefused, match="/b") as refused:
        integration.try_streaming_io(ask(library, origin.put("/b", b"other")), part)
    assert refused.value.reason == "foreign-part"
    assert part.read_bytes() == BODY[:AT]


@pytest.mark.parametrize(
    "response",
    [None, "body", b"body", io.BytesIO(b"body"), SimpleNamespace(status_code=200, content=b"x")],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_response_is_named(part: Path, response: Any) -> None:
    with pytest.raises(TypeError, match="response must be one of httpx"):
        integration.try_streaming_io(response, part)
    assert not part.exists()


def test_an_asynchronous_response_is_named(origin: Origin, part: Path) -> None:
    async def get() -> httpx.Response:
        async with httpx.AsyncClient() as client:
            return await client.send(client.build_request("GET", origin.put("/a", BODY)), stream=True)

    with pytest.raises(TypeError, match="asynchronous"):
        integration.try_streaming_io(ThreadPoolExecutor(1).submit(asyncio.run, get()).result(10), part)


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"chunk_bytes": 0}, "chunk_bytes"),
        ({"chunk_bytes": "64K"}, "chunk_bytes"),
        ({"progress_callback": 3}, "progress_callback"),
        ({"request_headers": [("a", "b")]}, "request_headers"),
        ({"part_path": 3}, "part_path"),
        ({"part_path": ""}, "part_path"),
    ],
)
def test_a_wrong_argument_is_named(origin: Origin, part: Path, how: dict[str, Any], named: str) -> None:
    given = {"part_path": part} | how
    with pytest.raises(TypeError, match=named):
        integration.try_streaming_io(ask("urllib", origin.put("/a", BODY)), given.pop("part_path"), **given)


def test_a_callback_that_raises_leaves_what_came(origin: Origin, part: Path) -> None:
    """As Ctrl-C does."""
    url = origin.put("/a", BODY)

    def stop(had: int, _total: int | None) -> None:
        if had >= AT:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        once("httpx", url, part, progress_callback=stop)
    assert decide(part).resume_byte_offset >= AT
    assert once("httpx", url, part).sha256_hex == sha(BODY)


def test_an_error_of_the_callback_is_no_broken_body(origin: Origin, part: Path) -> None:
    """A closed pipe is an OSError, too."""

    def print_nowhere(_had: int, _total: int | None) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        once("urllib", origin.put("/a", BODY), part, progress_callback=print_nowhere)


def test_a_reserve_on_the_disk_is_kept(origin: Origin, part: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R9."""
    url = origin.put("/a", BODY, cut(AT))
    with pytest.raises(BodyIncomplete):
        once("httpx", url, part)
    monkeypatch.setenv("SCRAPY_STREAMING_MIN_FREE_BYTES", str(1 << 60))
    with pytest.raises(WriteFailed) as full:
        once("httpx", url, part)
    assert full.value.reason == "no-space"
    assert part.read_bytes() == BODY[:AT]


def test_bodies_come_no_faster_than_they_may(
    origin: Origin, part: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRAPY_STREAMING_MAX_RATE", str(2 * len(BODY)))
    metrics = once("httpx", origin.put("/a", BODY), part)
    assert metrics.elapsed_ms > 200  # half a second's worth, less what may come at once


def test_a_folder_that_cannot_be_written_is_said(origin: Origin, tmp_path: Path) -> None:
    tmp_path.joinpath("file").write_bytes(b"")
    with pytest.raises(WriteFailed):
        integration.try_streaming_io(ask("urllib", origin.put("/a", BODY)), tmp_path / "file" / "a.part")


def cut_off(asked: Any, resource: Any) -> Answer:
    fields = resource.fields() | {"Vary": "Accept-Language"}
    return honest(asked, resource, cut=AT, end="reset", fields=fields)


def test_fields_that_select_are_compared_when_the_answer_comes(origin: Origin, part: Path) -> None:
    """R40: the part is German, and a French request must not be joined to it."""
    url = origin.put("/a", BODY, cut_off)
    with pytest.raises(BodyIncomplete):
        integration.try_streaming_io(ask("httpx", url, {"Accept-Language": "de"}), part)
    fields = decide(part).headers
    with pytest.raises(AnswerRefused) as refused:
        integration.try_streaming_io(ask("httpx", url, fields | {"Accept-Language": "fr"}), part)
    assert refused.value.reason == "unproven-206"


def test_a_request_that_is_not_known_selects_nothing(origin: Origin, part: Path) -> None:
    """urllib keeps no request: where Vary speaks of one, the caller has to say what was sent."""
    url = origin.put("/a", BODY, cut_off, cut_off, cut_off)
    with pytest.raises(BodyIncomplete):
        integration.try_streaming_io(ask("urllib", url), part)
    fields = decide(part).headers
    with pytest.raises(AnswerRefused):
        integration.try_streaming_io(ask("urllib", url, fields), part)
    sent = {"Accept-Language": "de"}
    part.unlink()
    with pytest.raises(BodyIncomplete):
        integration.try_streaming_io(ask("urllib", url, sent), part, request_headers=sent)
    sent |= decide(part).headers
    metrics = integration.try_streaming_io(ask("urllib", url, sent), part, request_headers=sent)
    assert metrics is not None
    assert metrics.resumed_from_bytes == AT


# -- Scrapy ----------------------------------------------------------------------------------


def scrapy_response(body: bytes, status: int = 200, kind: type[Response] = Response, **how: Any) -> Response:
    url = "https://example.org/a"
    fields = how.pop("headers", FIELDS)
    return kind(url, status=status, headers=fields, body=body, request=Request(url), **how)


@pytest.mark.parametrize("kind", [Response, HtmlResponse])
def test_a_response_of_scrapy_is_taken(part: Path, kind: type[Response]) -> None:
    metrics = integration.try_streaming_io(scrapy_response(BODY, kind=kind), part)
    assert metrics is not None
    assert (metrics.bytes_written, metrics.sha256_hex) == (len(BODY), sha(BODY))
    assert part.read_bytes() == BODY


def test_a_206_of_scrapy_is_judged_too(part: Path) -> None:
    with pytest.raises(AnswerRefused):
        integration.try_streaming_io(scrapy_response(BODY, 206), part)


@pytest.mark.parametrize("flag", ["partial", "dataloss", "download_stopped"])
def test_a_response_that_scrapy_doubts_is_refused(part: Path, flag: str) -> None:
    with pytest.raises(StreamingError) as refused:
        integration.try_streaming_io(scrapy_response(BODY, flags=[flag]), part)
    assert refused.value.reason == f"incomplete-{flag.replace('_', '-')}"


def test_a_response_that_was_streamed_is_taken(part: Path, tmp_path: Path) -> None:
    state = PartState("https://example.org/a", Validators())
    streamed = StreamedResponse.around(
        scrapy_response(b""), Replace(state, Reason.FETCHED), small_part(state, BODY)
    )
    metrics = integration.try_streaming_io(streamed, part)
    assert metrics is not None
    assert metrics.sha256_hex == sha(BODY)
    assert decide(part).mode == "cached"
    nothing = StreamedResponse.around(scrapy_response(b""), Replace(state, Reason.FETCHED))
    with pytest.raises(AnswerRefused):
        integration.try_streaming_io(nothing, part)


@pytest.mark.parametrize(
    ("pool", "url"),
    [
        (urllib3.HTTPConnectionPool("[::1]", 8080), "http://[::1]:8080/a"),
        (urllib3.HTTPSConnectionPool("example.org", 443), "https://example.org/a"),
    ],
)
def test_the_url_of_a_response_of_a_pool_is_whole(pool: urllib3.HTTPConnectionPool, url: str) -> None:
    assert answer_of(urllib3.HTTPResponse(io.BytesIO(), request_url="/a", pool=pool)).url == url
