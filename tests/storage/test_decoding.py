"""Content codings taken off as a stream (R34, E4, F20)."""

from __future__ import annotations

import gzip
import hashlib
import random
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import brotli
import pytest
from support.codings import zstd

from scrapy_streaming.exceptions import DecodedTooLarge, Undecodable
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.storage.complete_part import CompletePart, small_part
from scrapy_streaming.storage.decoding import STEP, coded_twice, decodable, decoded
from scrapy_streaming.storage.parts import SMALL_DECODED, PartStore

TEXT = b"".join(b"%d: the same words again and again\n" % n for n in range(20_000))
NOISE = random.Random(34).randbytes(300_000)


def raw_deflate(data: bytes) -> bytes:
    maker = zlib.compressobj(wbits=-15)
    return maker.compress(data) + maker.flush()


CODED: dict[str, tuple[Callable[[bytes], bytes], tuple[str, ...]]] = {
    "gzip": (gzip.compress, ("gzip",)),
    "gzip-members": (lambda d: gzip.compress(d[:999]) + gzip.compress(d[999:]), ("gzip",)),
    "gzip-padded": (lambda d: gzip.compress(d) + bytes(512), ("gzip",)),
    "deflate": (zlib.compress, ("deflate",)),
    "deflate-raw": (raw_deflate, ("deflate",)),
    "br": (brotli.compress, ("br",)),
    "zstd": (zstd, ("zstd",)),
    "zstd-frames": (lambda d: zstd(d[:999]) + zstd(d[999:]), ("zstd",)),
    "twice": (lambda d: brotli.compress(gzip.compress(d)), ("gzip", "br")),
}


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize(
    ("data", "size"),
    [(TEXT, 4096), (TEXT, 1 << 20), (NOISE, 4096), (NOISE, 1 << 20), (TEXT[:9999], 1), (b"x", 1), (b"", 1)],
    ids=["text", "text-at-once", "noise", "noise-at-once", "by-bytes", "byte", "nothing"],
)
def test_what_was_coded_comes_back_however_it_arrives(name: str, size: int, data: bytes) -> None:
    code, codings = CODED[name]
    chunks = list(decoded(pieces(code(data), size), codings))
    assert b"".join(chunks) == data
    assert max(map(len, chunks), default=0) <= 2 * STEP


@pytest.mark.parametrize("name", CODED)
def test_a_body_that_ends_too_early_is_no_body(name: str) -> None:
    code, codings = CODED[name]
    whole = code(TEXT)
    end = len(whole) - 512 if name == "gzip-padded" else len(whole)
    for cut in (1, 5, end // 2):
        with pytest.raises(Undecodable):
            list(decoded([whole[: end - cut]], codings))


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("junk", [b"<html>not coded at all</html>", b"\xff" * 99])
def test_what_is_not_in_its_coding_is_refused(name: str, junk: bytes) -> None:
    code, codings = CODED[name]
    with pytest.raises(Undecodable):
        list(decoded([junk], codings))
    if name in ("br", "zstd", "zstd-frames", "twice"):
        with pytest.raises(Undecodable):
            list(decoded([code(TEXT), junk], codings))
    else:  # the check behind what came before held
        assert b"".join(decoded([code(TEXT), junk], codings)) == TEXT


@pytest.mark.proves("F20")
@pytest.mark.parametrize("codings", [("gzip",), ("gzip", "gzip"), ("gzip", "gzip", "gzip"), ("zstd",)])
def test_members_that_hold_nothing_have_an_end(codings: tuple[str, ...]) -> None:
    """F20, E4: a few octets that would keep a decoder at work for hours, and never reach a size."""
    octets = {"gzip": gzip.compress(b""), "zstd": zstd(b"")}[codings[0]] * 500_000
    for coding in codings[1:]:
        assert coding == "gzip"
        octets = gzip.compress(octets, 1)
    with pytest.raises(Undecodable, match="are empty"):
        list(decoded([octets], codings))


def test_an_error_behind_output_that_filled_a_step_is_a_refusal() -> None:
    """F20: zlib has read all octets, has more to give than fits, and finds the bad code only then."""
    # one literal and matches of 258 bytes, ``STEP`` bytes in all; then a distance code that does not exist
    octets = bytes.fromhex("ecc0010900000080a0feafee8806") + bytes(63) + b"\x08"
    whole = zlib.decompressobj(-15)
    assert len(whole.decompress(octets, STEP)) == STEP
    assert whole.unconsumed_tail == b"", "else the error comes with the next octets"
    with pytest.raises(Undecodable, match="invalid distance code"):
        list(decoded([octets], ("deflate",)))


def test_content_that_was_coded_once_more_is_told() -> None:
    """R34: a ``.gz`` in gzip."""
    once = gzip.compress(TEXT)
    assert coded_twice([gzip.compress(once)], "gzip")
    assert not coded_twice([once], "gzip")
    assert not coded_twice([TEXT], "gzip")
    assert coded_twice([zstd(zstd(TEXT))], "zstd")
    assert not coded_twice([brotli.compress(brotli.compress(TEXT))], "br")


def test_every_known_coding_can_be_taken_off_here() -> None:
    assert decodable() == {"gzip", "deflate", "br", "zstd"}


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[PartStore]:
    store = PartStore(tmp_path, fsync=False)
    yield store
    store.close()


def coded_part(data: bytes, coding: str) -> CompletePart:
    return small_part(PartState("https://h/x", Validators(), content_encoding=coding), data)


KEY = "ab" * 32


@pytest.mark.parametrize("size", [10, SMALL_DECODED, SMALL_DECODED + 1, len(TEXT)])
def test_a_part_is_decoded_into_memory_or_a_file_that_nothing_resumes(parts: PartStore, size: int) -> None:
    part = coded_part(gzip.compress(TEXT[:size]), "gzip")
    got = parts.decode(part, KEY, 3, 0)
    assert (b"".join(got.chunks()), got.length, got.coded) == (TEXT[:size], size, part.digest)
    assert got.digest.hex == hashlib.sha256(TEXT[:size]).hexdigest()
    assert (got.path is None) == (size <= SMALL_DECODED)
    assert parts.find(KEY) == []
    parts.discard(KEY, 3)
    assert list(parts.directory.iterdir()) == []


def test_no_byte_decodes_to_no_byte(parts: PartStore) -> None:
    assert parts.decode(coded_part(b"", "gzip"), KEY, 1, 0).length == 0


@pytest.mark.proves("F20")
@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "gzip, br"])
def test_a_bomb_is_stopped_at_the_limit_with_flat_memory(parts: PartStore, coding: str) -> None:
    """F20, E4: 200 MiB in some kilobytes, also coded twice; 20 MiB are allowed."""
    zeros = bytes(1 << 20)
    maker = zlib.compressobj(wbits=31 if coding.startswith("gzip") else 15)
    bomb = b"".join(maker.compress(zeros) for _ in range(200)) + maker.flush()
    if coding == "br":
        bomb = brotli.compress(zeros * 200, quality=3)
    if coding == "zstd":
        bomb = zstd(zeros * 200)
    if coding == "gzip, br":
        bomb = brotli.compress(bomb)
    part = coded_part(bomb, coding)
    tracemalloc.start()
    try:
        with pytest.raises(DecodedTooLarge):
            parts.decode(part, KEY, 1, 20 << 20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20
    assert list(parts.directory.iterdir()) == []
