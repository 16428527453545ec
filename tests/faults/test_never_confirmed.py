"""What rests on weak proof is never confirmed by a 304: unmarked ends, codings, parts left by a kill.

Each test ends with an honest origin that keeps the tag it gave last (rows R7, R33, R34, R75, R78).
"""

from __future__ import annotations

import gzip
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import brotli
import pytest
from support.codings import zstd
from support.crawl import Crawl, assert_sound, assert_stored, blobs, kept, run_crawl, sha256
from support.origin import Answer, Asked, Origin, Resource, cut, honest, partial, self_signed

SIZE, HALF = 600_000, 300_000
TAG = '"v1"'
ALWAYS = {"STREAMING_REVALIDATE": "always"}


def body_of(name: str, size: int = SIZE) -> bytes:
    return random.Random(name).randbytes(size)


def unmarked(at: int | None = None, end: str = "close") -> Callable[[Asked, Resource], Answer]:
    """A body that only the end of the connection ends, after *at* bytes."""
    return lambda _, resource: Answer(200, resource.fields(), resource.body[:at], length=None, end=end)


def without_ranges(answer: Callable[[Asked, Resource], Answer]) -> Callable[[Asked, Resource], Answer]:
    def deaf(asked: Asked, resource: Resource) -> Answer:
        asked.fields.pop("range", None)
        return answer(asked, resource)

    return deaf


# -- R33: ends that only the closed connection marks --------------------------------------------


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[Origin]:
    server = Origin(tls=self_signed(tmp_path))
    yield server
    server.close()


def test_an_end_without_close_notify_is_no_end(secure: Origin, store: Path) -> None:
    """R33, R61: over TLS only close_notify ends a body that has no length; what came is resumed."""
    rude = secure.put(
        "/rude.bin", body_of("rude"), *[unmarked(HALF, "fin")] * 2, default=unmarked(), etag=TAG
    )
    polite = secure.put("/polite.bin", body_of("polite"), unmarked(), etag=TAG)
    crawl = run_crawl([rude, polite], store)
    assert crawl.decisions(rude)[:4] == ["nothing-stored", "fetched", "strong-validator", "range-ignored"]
    assert "close-delimited" not in crawl.decisions(rude)[:5]
    assert crawl.decisions(polite) == [
        "nothing-stored", "fetched", "close-delimited", "probe-end", "probed-whole",
    ]  # fmt: skip
    assert_stored(store, crawl.files[polite], body_of("polite"))
    assert_sound(store, [body_of("rude"), body_of("polite")])


def test_a_body_that_is_cut_twice_at_one_place_is_not_kept_by_a_304(origin: Origin, store: Path) -> None:
    """R33: a server without ranges, cut twice at the same byte: stored as unproven, then fetched anew."""
    deaf, short = without_ranges(honest), without_ranges(unmarked(HALF))
    url = origin.put("/cut.bin", body_of("cut"), short, short, default=deaf, etag=TAG)
    first = run_crawl([url], store)
    entry = first.files[url]
    assert (entry["size"], entry["proof"], entry["etag"]) == (HALF, "unproven", None)
    second = run_crawl([url], store, settings=ALWAYS)
    assert_stored(store, second.files[url], body_of("cut"))
    assert second.files[url]["proof"] == "length"
    assert "if-none-match" not in origin.asked("/cut.bin")[2].fields
    third = run_crawl([url], store, settings=ALWAYS)
    assert third.files[url]["status"] == "uptodate"
    assert third.files[url]["proof"] == "length"


def test_a_short_body_is_not_stored_where_the_server_speaks_of_more(origin: Origin, store: Path) -> None:
    """R33: the same bytes twice prove nothing once an answer spoke of bytes behind them."""
    total, bare = f"bytes */{SIZE}", {"etag": "", "last_modified": ""}
    more: dict[str, tuple[Callable[[Asked, Resource], Answer], dict[str, str]]] = {
        "untagged-206": (lambda a, r: partial(r, HALF), bare),
        "no-total": (lambda a, r: of_unknown_length(partial(r, HALF)), {"etag": TAG}),
        "longer-416": (lambda a, r: Answer(416, {"Content-Range": total}), {"etag": TAG}),
        "cut-200": (lambda a, r: Answer(200, r.fields(), r.body, end="close", cut=HALF), bare),
    }

    def answers(to_probe: Callable[[Asked, Resource], Answer]) -> Callable[[Asked, Resource], Answer]:
        short = unmarked(HALF)
        return lambda asked, resource: (to_probe if "range" in asked.fields else short)(asked, resource)

    urls = {
        name: origin.put(f"/{name}.bin", body_of(name), default=answers(probe), **kind)
        for name, (probe, kind) in more.items()
    }
    crawl = run_crawl(list(urls.values()), store)
    assert crawl.files == {}
    assert blobs(store) == {}
    assert all("close-delimited" in crawl.decisions(url) for url in urls.values())


def of_unknown_length(answer: Answer) -> Answer:
    fields = dict(answer.pairs())
    return replace(
        answer, fields=fields | {"Content-Range": fields["Content-Range"].rpartition("/")[0] + "/*"}
    )


# -- R34: codings -------------------------------------------------------------------------------

TEXT = b"".join(b"line %d of many that look the same\n" % n for n in range(30_000))


@dataclass(frozen=True)
class Coded:
    """``sent`` under ``coding``; ``stored`` is what must be published, ``None`` for no file."""

    coding: str
    sent: bytes
    stored: bytes | None
    reason: str = "fetched"
    media_type: str = "text/plain"


PACKED = gzip.compress(TEXT, mtime=0)
CODED = {
    "gzip.txt": Coded("gzip", PACKED, TEXT),
    "small.txt": Coded("gzip", gzip.compress(b"small"), b"small"),
    "deflate.txt": Coded("deflate", zlib.compress(TEXT), TEXT),
    "br.txt": Coded("br", brotli.compress(TEXT), TEXT),
    "zstd.txt": Coded("zstd", zstd(TEXT), TEXT),
    "twice.txt": Coded("gzip, br", brotli.compress(PACKED), TEXT),
    "named.tar.gz": Coded("gzip", PACKED, PACKED, media_type="application/x-tar"),
    "typed": Coded("gzip", PACKED, PACKED, media_type="application/gzip"),
    "lies.txt": Coded("gzip", TEXT, None, "undecodable"),
    "short.txt": Coded("gzip", PACKED[:-9], None, "undecodable"),
    "unknown.txt": Coded("compress", TEXT, None, "coding-unsupported"),
    "bomb.txt": Coded("gzip", gzip.compress(bytes(8 << 20)), None, "decoded-too-large"),
    "expected.txt": Coded("gzip", PACKED, PACKED),
    "once-more.txt.gz": Coded("gzip", gzip.compress(PACKED), PACKED),
    "sent-so.txt": Coded("aws-chunked", TEXT, TEXT),
    "trailing.txt": Coded("gzip", PACKED + b"\r\n", TEXT),
}


def coded(name: str) -> Callable[[Asked, Resource], Answer]:
    """An answer in an unrequested coding, under the tag of the identity form."""
    case = CODED[name]
    fields = {"Content-Encoding": case.coding, "Content-Type": case.media_type}
    return lambda _, resource: Answer(200, resource.fields() | fields, case.sent)


@pytest.mark.parametrize("io", [True, False], ids=["streamed", "buffered"])
def test_an_unrequested_coding_is_decoded_and_its_tag_confirms_nothing(
    origin: Origin, store: Path, io: bool
) -> None:
    """R34, E4: whatever handler brought it; an identity origin with the same tag gives the file anew."""
    urls = {name: origin.put(f"/{name}", TEXT, coded(name), etag=TAG) for name in CODED}
    urls["expected.txt"] += f"#sha256={sha256(PACKED)}"
    settings = {"STREAMING_IO_ENABLED": io, "STREAMING_MAX_SIZE": 4 << 20, "RETRY_ENABLED": False}
    first = run_crawl(list(urls.values()), store, settings=settings)
    for name, case in CODED.items():
        entry = first.files.get(urls[name])
        if case.stored is None:
            assert entry is None, name
            assert first.stat(f"streaming/failed/{case.reason}") >= 1, name
        else:
            assert_stored(store, entry, case.stored)
            assert entry is not None
            assert entry["etag"] == (TAG if name == "sent-so.txt" else None), name
    assert_sound(store, [TEXT, PACKED, b"small"])
    assert kept(store) == 0
    origin.forget()
    del urls["expected.txt"]
    second = run_crawl(list(urls.values()), store, settings=settings | ALWAYS)
    confirming = [a.target for a in origin.requests if {"if-none-match", "if-modified-since"} & set(a.fields)]
    assert confirming == ["/sent-so.txt"]  # that word names no coding
    for url in urls.values():
        assert_stored(store, second.files.get(url), TEXT)


@pytest.mark.parametrize("order", [543, 700])
def test_a_middleware_finds_a_coded_body_decoded(origin: Origin, store: Path, order: int) -> None:
    """R34, R76: on either side of this package's; bytes only wrapped anew are the file, others are new."""
    url = origin.put("/wrapped.txt", TEXT, coded("gzip.txt"), etag=TAG)
    other = origin.put("/changed.txt", TEXT, coded("gzip.txt"), etag=TAG)
    settings = {"DOWNLOADER_MIDDLEWARES": {"support.components.Rewrapping": order}}
    crawl = run_crawl([url, other], store, settings=settings)
    assert_stored(store, crawl.files.get(url), TEXT)
    assert_stored(store, crawl.files.get(other), TEXT + b"!")
    assert crawl.files[other]["reason"] == "transformed"


def test_the_requests_own_accept_encoding_is_kept_where_nothing_is_resumed(
    origin: Origin, store: Path
) -> None:
    """R78: on a plain GET; a resume needs identity, which is said once."""
    asked_for: list[str] = []

    def packing(asked: Asked, resource: Resource) -> Answer:
        asked_for.append(asked.fields["accept-encoding"])
        if "gzip" in asked_for[-1]:
            return coded("gzip.txt")(asked, resource)
        return honest(asked, resource)

    url = origin.put("/own.txt", TEXT, packing, default=packing, etag=TAG)
    broken = origin.put("/broken.txt", TEXT, cut(HALF, "close"), default=honest, etag=TAG)
    own = {"ITEM_PIPELINES": {"support.components.OwnEncoding": 1}}
    crawl = run_crawl([url, broken], store, settings=own)
    assert asked_for == ["gzip;q=0.5"]
    for each in (url, broken):
        assert_stored(store, crawl.files.get(each), TEXT)
    said = [a.fields["accept-encoding"] for a in origin.asked("/broken.txt")]
    assert said == ["gzip;q=0.5", "identity"]
    assert crawl.log.count("Accept-Encoding of requests is `identity`") == 1


# -- R7: whole parts left by a kill -------------------------------------------------------------


def left_whole(origin: Origin, store: Path, names: list[str]) -> dict[str, str]:
    """Leave whole parts that were never published; return their URLs."""
    urls = {name: origin.put(f"/{name}.bin", body_of(name), etag=TAG) for name in names}
    crashing = {"ITEM_PIPELINES": {"support.components.Crashing": 1}}
    assert run_crawl(list(urls.values()), store, settings=crashing).files == {}
    assert blobs(store) == {}
    assert kept(store) == SIZE * len(names)
    origin.forget()
    return urls


def words(crawl: Crawl, urls: dict[str, str]) -> dict[str, list[str]]:
    return {name: crawl.decisions(url) for name, url in urls.items()}


def test_a_whole_part_is_asked_about_before_it_is_published(origin: Origin, store: Path) -> None:
    """R7: with STREAMING_REVALIDATE=always; a 304 publishes it, a 200 replaces it."""
    urls = left_whole(origin, store, ["same", "changed", "known"])
    origin.put("/changed.bin", body_of("new"), etag='"v2"')
    urls["known"] += f"#sha256={sha256(body_of('known'))}"
    crawl = run_crawl(list(urls.values()), store, settings=ALWAYS)
    assert words(crawl, urls) == {
        "same": ["confirm-whole", "confirmed-whole"],
        "changed": ["confirm-whole", "changed"],
        "known": ["whole-part"],
    }
    assert_stored(store, crawl.files[urls["same"]], body_of("same"))
    assert crawl.files[urls["same"]]["resumed_from"] == SIZE
    assert_stored(store, crawl.files[urls["changed"]], body_of("new"))
    assert_stored(store, crawl.files[urls["known"]], body_of("known"))
    assert origin.asked("/known.bin") == []
    assert sum(asked.sent for asked in origin.asked("/same.bin")) == 0
    assert not [asked for asked in origin.requests if "range" in asked.fields]


def test_a_whole_part_is_published_with_no_request_while_it_is_fresh(origin: Origin, store: Path) -> None:
    """R7: within FILES_EXPIRES; one that is older is asked about."""
    urls = left_whole(origin, store, ["old"])
    origin.put("/old.bin", body_of("newer"), etag='"v2"')
    fresh = run_crawl([urls["old"]], store, settings={"FILES_EXPIRES": 1})
    assert_stored(store, fresh.files[urls["old"]], body_of("old"))
    assert origin.requests == []
    expired = left_whole(origin, store / "2", ["past"])
    origin.put("/past.bin", body_of("newer"), etag='"v2"')
    crawl = run_crawl([expired["past"]], store / "2", settings={"FILES_EXPIRES": 0})
    assert_stored(store / "2", crawl.files[expired["past"]], body_of("newer"))


# -- R75: just modified -------------------------------------------------------------------------


def test_a_file_that_changes_within_its_second_is_not_confirmed_by_its_tag(
    origin: Origin, store: Path
) -> None:
    """R75, R70: nginx's tag is made of the second, so both bodies have it."""
    modified = "Mon, 01 Jan 2024 00:00:00 GMT"
    kind = {"etag": '"65920080-927c0"', "last_modified": modified}

    def just_now(asked: Asked, resource: Resource) -> Answer:
        return Answer(200, resource.fields() | {"Date": modified}, resource.body)

    url = origin.put("/racy.bin", body_of("first"), just_now, **kind)
    half = origin.put("/half.bin", body_of("first"), lambda a, r: cut_now(just_now(a, r)), **kind)
    first = run_crawl([url, half], store, settings={"RETRY_ENABLED": False})
    assert first.decisions(url) == ["nothing-stored", "just-modified"]
    assert first.files[url]["etag"] is None
    for path in ("/racy.bin", "/half.bin"):
        origin.put(path, body_of("second"), **kind)
    second = run_crawl([url, half], store, settings=ALWAYS)
    for each in (url, half):
        assert_stored(store, second.files[each], body_of("second"))


def cut_now(answer: Answer) -> Answer:
    return Answer(answer.status, answer.fields, answer.body, end="close", cut=HALF)
