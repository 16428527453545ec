"""Lines of an export, and the files of feeds: any text is read or refused, nothing is lost."""

from __future__ import annotations

import csv
import io
import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scrapy_streaming.protocol import portable
from scrapy_streaming.protocol.fields import EntityTag
from scrapy_streaming.protocol.jobs import Completion, StoredRepresentation
from scrapy_streaming.protocol.portable import (
    FeedFile,
    Record,
    Unreadable,
    documents,
    files_of_item,
    record_of,
    to_document,
)
from scrapy_streaming.protocol.validators import Validators

URL = "http://h/a.pdf"
ENTRY = {"url": URL, "path": "full/a.pdf", "checksum": "0" * 32, "status": "downloaded"}
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_TIME = st.floats(-1e9, 1e10)
_HEX = st.binary(min_size=32, max_size=32).map(bytes.hex)


@st.composite
def records(draw: st.DrawFn) -> Record:
    some = st.none() | _TEXT
    tag = draw(st.none() | st.sampled_from(['"v"', 'W/"v"', '""']).map(EntityTag.parse))
    at, represents = draw(_TIME), draw(st.booleans())
    known = StoredRepresentation(
        f"sha256:{draw(_HEX)}", draw(st.integers(0, 1 << 62)), Validators(tag, draw(some), draw(some)),
        draw(_TEXT), draw(some), tuple(draw(st.lists(_TEXT, max_size=3))), draw(_TEXT), at, draw(_TEXT),
    )  # fmt: skip
    done = Completion(
        draw(_HEX)[:32], known, at, generation=draw(st.integers(1, 9)), path=draw(some),
        by_response=draw(st.booleans()),
    )  # fmt: skip
    return Record(
        draw(_TEXT), draw(_TEXT), draw(_TEXT), draw(_HEX), done, draw(st.integers(0, 9)), represents,
        draw(_TIME) if represents else 0.0,
    )  # fmt: skip


@given(records())
def test_a_record_comes_back_as_it_was(record: Record) -> None:
    line = json.dumps(to_document(record))
    assert line.isascii()
    assert record_of(json.loads(line)) == record


@given(records(), st.data())
def test_a_line_with_a_field_of_another_kind_is_refused(record: Record, data: st.DataObject) -> None:
    document = to_document(record)
    name = data.draw(st.sampled_from(sorted(document)))
    document[name] = data.draw(st.sampled_from([[1], {"a": 1}, -1.5e300, True, "\x00nonsense"]))
    with suppress(Unreadable):
        assert to_document(record_of(document)) == document, "it may be such a value"


KNOWN = StoredRepresentation("sha256:" + "2" * 64, 5, Validators(), URL, fetched_at=1.0)
RECORD = Record(
    "w", "", URL, "0" * 64, Completion("1" * 32, KNOWN, 1.0, generation=1, path="a.pdf"), 0, True, 1.0
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("format", 99, "newer-format"),
        ("etag", "no tag", "unreadable"),
        ("digest", "sha256:0", "unreadable"),
        ("digest", 5, "unreadable"),
        ("vary", [1], "unreadable"),
        ("by_response", 1, "unreadable"),
        ("size", -1, "unreadable"),
        ("size", True, "unreadable"),
        ("completed_at", 1e12, "unreadable"),
        ("request_hash", "xyz", "unreadable"),
    ],
)
def test_a_line_with_a_wrong_field_is_refused_by_its_name(name: str, value: object, reason: str) -> None:
    document = to_document(RECORD)
    assert record_of(document) == RECORD
    with pytest.raises(Unreadable, match=name) as caught:
        record_of({**document, name: value})
    assert caught.value.reason == reason


def test_a_row_of_csv_that_cannot_be_read_costs_itself_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "LONGEST", 100)
    found = read(f"title,files\nok,[]\n{'x' * 200},[]\nok,[]\n")
    assert [number for number, _ in found] == [2, 3, 4]
    assert isinstance(found[1][1], str)


def read(text: str) -> list[tuple[int, Any]]:
    return [
        (number, str(found) if isinstance(found, Unreadable) else found)
        for number, found in documents(io.StringIO(text, newline=""))
    ]


ITEMS = [{"files": [ENTRY], "n": n} for n in range(3)]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("".join(json.dumps(item) + "\n" for item in ITEMS), [1, 2, 3]),
        ("[\n" + ",\n".join(json.dumps(item) for item in ITEMS) + "\n]", [2, 3, 4]),
        ("[\n" + ",\n".join(json.dumps(item, indent=4) for item in ITEMS) + "\n]\n", [2, 13, 24]),
        (json.dumps(ITEMS), [1, 1, 1]),
        ("\ufeff\n\n" + json.dumps(ITEMS[0]) + "\n" + json.dumps(ITEMS[1:]), [3, 4, 4]),
    ],
    ids=["lines", "list", "indented", "one line", "with a mark and empty lines"],
)
def test_json_is_read_as_scrapy_writes_it(text: str, numbers: list[int]) -> None:
    assert read(text) == list(zip(numbers, ITEMS, strict=True))


def test_what_is_no_item_costs_itself_only() -> None:
    good = json.dumps(ITEMS[0])
    text = f'{good}\n{{"cut": \n{good}\n7\nx\n{{"a": {"[" * 50000}\n{good}\n{{"end"'
    found = read(text)
    assert [number for number, each in found if each == ITEMS[0]] == [1, 3, 7]
    assert [number for number, each in found if isinstance(each, str)] == [2, 4, 5, 6, 8]


def test_csv_is_read_as_scrapy_writes_it() -> None:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(["title", "files"])
    for cell in (str([ENTRY, ENTRY]), json.dumps([ENTRY]), "", "7", "__import__('os')", "["):
        writer.writerow(["two\nlines", cell])
    found = read(stream.getvalue())
    assert [number for number, _ in found] == [2, 4, 6, 8, 10, 12]
    files = [files_of_item(item, "files") for _, item in found]
    file = FeedFile(URL, "full/a.pdf", "0" * 32)
    assert files[:3] == [[file, file], [file], []]
    assert [[error.reason for error in errors] for errors in files[3:]] == [["unreadable"]] * 3


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (7, "unreadable"),
        ({"path": "a"}, "no-url"),
        ({"url": "", "path": "a"}, "no-url"),
        ({"url": URL}, "no-path"),
        ({"url": URL, "path": 3}, "no-path"),
        ({"url": URL, "path": "a", "checksum": "abc"}, "unreadable"),
        ({"url": URL, "path": "a", "checksum": "x" * 32}, "unreadable"),
    ],
)
def test_an_entry_that_says_too_little_is_refused(entry: object, reason: str) -> None:
    [found] = files_of_item({"files": [entry]}, "files")
    assert isinstance(found, Unreadable)
    assert found.reason == reason


def test_a_file_need_not_have_a_checksum() -> None:
    assert files_of_item({"files": [{"url": URL, "path": "a"}]}, "files") == [FeedFile(URL, "a", None)]
    assert files_of_item({}, "files") == files_of_item({"files": None}, "files") == []


@given(st.text(max_size=300))
def test_any_text_ends_in_documents_and_errors(text: str) -> None:
    for number, found in documents(io.StringIO(text, newline="")):
        assert number >= 1
        if not isinstance(found, Unreadable):
            files_of_item(found, "files")
