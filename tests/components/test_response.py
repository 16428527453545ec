"""A streamed response by itself: what reads its part, and what does not (C9)."""

from __future__ import annotations

import gc
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from scrapy.http import HtmlResponse, Response, TextResponse
from scrapy.utils.response import get_meta_refresh

from scrapy_streaming import StreamedResponse
from scrapy_streaming.protocol.answers import AlreadyWhole, PassOn
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.protocol.reasons import Reason
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.storage.complete_part import CompletePart, small_part

URL = "http://example.org/page.html"
PAGE = b'<html><meta charset="latin-1"><meta http-equiv="refresh" content="5;url=/next"><title>\xfc</title>'
STATE = PartState(URL, Validators(), media_type="text/html")


def on_disk(path: Path, data: bytes) -> CompletePart:
    path.write_bytes(data)
    return replace(small_part(STATE, data), path=path, data=None)


def around(part: CompletePart, kind: type[Response] = HtmlResponse, status: int = 200) -> StreamedResponse:
    return StreamedResponse.around(kind(URL, status=status), AlreadyWhole(STATE), part)


def test_copies_share_the_part_and_read_nothing(tmp_path: Path) -> None:
    """Also those with other fields or of another class; what one of them reads, all have."""
    response = around(on_disk(tmp_path / "part", PAGE))
    (tmp_path / "part").rename(tmp_path / "elsewhere")
    copies = [
        response.copy(),
        response.replace(headers={"X": "1"}, status=203),
        response.replace(cls=TextResponse, encoding="cp1252"),
    ]
    for each in copies:
        assert each.part is response.part
        assert isinstance(each, StreamedResponse | TextResponse)
        with pytest.raises(FileNotFoundError):
            _ = each.body
    (tmp_path / "elsewhere").rename(tmp_path / "part")
    assert copies[1].body == PAGE
    (tmp_path / "part").unlink()
    assert response.body == PAGE
    assert response.css("title::text").get() == "ü"
    assert copies[2].encoding == "cp1252"


def test_another_body_is_another_representation(tmp_path: Path) -> None:
    """R76: bytes or text, with no validators."""
    response = around(on_disk(tmp_path / "part", PAGE))
    for body, stored in ((b"other", b"other"), ("ü", b"\xfc")):
        other = response.replace(body=body)
        assert isinstance(other, HtmlResponse)
        assert other.outcome == PassOn(Reason.TRANSFORMED)
        assert other.part is not None
        assert (other.body, other.part.length) == (stored, len(stored))
        assert other.part.finished.state.validators == Validators()
    assert response.body == PAGE


def test_a_small_body_has_a_file_as_long_as_the_response_is_referenced() -> None:
    response = around(small_part(STATE, PAGE))
    assert response.part is not None
    path = response.part.path
    assert path == response.part.path
    assert path.read_bytes() == PAGE
    del response
    gc.collect()
    assert not path.exists()


def test_reading_a_large_body_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    response = around(on_disk(tmp_path / "part", PAGE))
    assert response.part is not None
    response.part.warn_size = len(PAGE)
    assert (response.body, caplog.text) == (PAGE, "")
    response = around(on_disk(tmp_path / "part", PAGE))
    assert response.part is not None
    response.part.warn_size = len(PAGE) - 1
    with caplog.at_level(logging.WARNING):
        _ = response.body, response.copy().body, response.text
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{len(PAGE)} bytes" in caplog.text
    assert URL in caplog.text


def test_the_beginning_is_enough_to_find_a_meta_refresh(tmp_path: Path) -> None:
    """What ``MetaRefreshMiddleware`` does with every page reads no large one."""
    response = around(on_disk(tmp_path / "part", PAGE + b" " * (1 << 20)))
    assert response.part is not None
    response.part.warn_size = 1  # it would say so
    assert get_meta_refresh(response) == (5.0, "http://example.org/next")
    assert response.part._read is None


@pytest.mark.parametrize(
    ("status", "fields", "expected"),
    [
        (200, {"Content-Length": "9"}, {"Content-Length": "9"}),
        (206, {"Content-Range": "bytes 5-8/9", "Content-Length": "4", "Content-Type": "a/b"},
         {"Content-Length": str(len(PAGE)), "Content-Type": "a/b"}),
        (416, {"Content-Range": "bytes */9", "Content-Length": "99", "Content-Type": "text/plain"},
         {"Content-Length": str(len(PAGE)), "Content-Type": "text/html"}),
        (304, {}, {"Content-Length": str(len(PAGE)), "Content-Type": "text/html"}),
    ],
)  # fmt: skip
def test_a_whole_file_is_a_200_whatever_answered(status: int, fields: dict, expected: dict) -> None:
    head = Response(URL, status=status, headers={**fields, "Content-Encoding": "gzip"})
    response = StreamedResponse.around(head, AlreadyWhole(STATE), small_part(STATE, PAGE))
    assert response.status == 200
    assert {name.decode(): value[0].decode() for name, value in response.headers.items()} == expected


@pytest.mark.skipif(
    not hasattr(Response, "to_dict"),
    reason="Response.to_dict is new in Scrapy 2.19; the oldest supported has none",
)
@pytest.mark.parametrize("kind", [Response, HtmlResponse])
def test_what_is_kept_of_it_is_a_response_of_scrapys(kind: type[Response]) -> None:
    """``to_dict`` names a class that Scrapy can load."""
    from scrapy.utils.response import response_from_dict

    again = response_from_dict(around(small_part(STATE, PAGE), kind).to_dict())
    assert (type(again), again.body) == (HtmlResponse if kind is HtmlResponse else type(again), PAGE)
    assert not isinstance(again, StreamedResponse)
