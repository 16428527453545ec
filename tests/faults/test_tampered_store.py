"""A store that is tampered with between two crawls: nothing wrong is reported under a digest (R77, S4).

For each user many files share one store: they are fetched, tampered with, each in its own way, and
asked for again, without a request where nothing is wrong (``fresh``) and by a 304 (``always``).
"""

from __future__ import annotations

import io
import os
import random
import re
import sqlite3
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image
from support.crawl import Crawl, assert_stored, blobs, run_crawl, sha256
from support.origin import Origin

#: Root without its powers owns its files and may do no more with them than any user with his.
ORDINARY = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
SMALL, LARGE = 2_000, 300_000


def in_place(change: Callable[[bytes], bytes], *, keep_time: bool = False) -> Callable[[Path], None]:
    """Write into the file itself, as ``FilesPipeline`` does."""

    def tamper(path: Path) -> None:
        info, data = path.stat(), path.read_bytes()
        path.write_bytes(change(data))
        if keep_time:
            os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
        assert path.stat().st_ino == info.st_ino

    return tamper


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(flip(path.read_bytes()))
    other.replace(path)


WAYS: dict[str, Callable[[Path], None]] = {
    "size": in_place(lambda data: data + b"more"),
    "bit": in_place(flip),
    "bit-time-kept": in_place(flip, keep_time=True),
    "size-time-kept": in_place(lambda data: data[:-1], keep_time=True),
    "replaced": replaced,
    "truncated": in_place(lambda _: b""),
    "deleted": Path.unlink,
}
TARGETS = ("link", "copy", "blob")
NEXT = {"fresh": {}, "always": {"STREAMING_REVALIDATE": "always"}}


@dataclass(frozen=True)
class Case:
    """Two URLs with the same bytes, so one name is the blob's own file and one a copy."""

    target: str
    way: str
    size: int
    then: str

    @property
    def name(self) -> str:
        return f"{self.target}-{self.way}-{self.size}-{self.then}"

    @property
    def paths(self) -> tuple[str, str]:
        return f"/{self.name}/1.bin", f"/{self.name}/2.bin"

    @property
    def body(self) -> bytes:
        return random.Random(self.name).randbytes(self.size)

    @property
    def says(self) -> str:
        """What the one warning says."""
        own_file = self.way in ("replaced", "deleted")
        if self.target == "blob" or (self.target == "link" and not own_file):
            return "blob-missing" if self.way == "deleted" else "bad-blob"
        return "name-missing" if self.way == "deleted" else "bad-name"


CASES = [
    Case(target, way, size, then)
    for target in TARGETS
    for way in WAYS
    for size in (SMALL, LARGE)
    for then in NEXT
]


@dataclass
class Ran:
    """What came of it: the crawls and what they asked the origin for, by what came next.

    ``others``: the file beside the one that is tampered with, and its inode.
    """

    store: Path
    origin: Origin
    first: Crawl
    crawls: dict[str, Crawl]
    asked: dict[str, list[str]]
    others: dict[str, tuple[Path, int]]


def names(store: Path) -> list[Path]:
    return [path for path in (store / "full").rglob("*") if path.is_file()]


def chosen(store: Path, crawl: Crawl, origin: Origin, case: Case) -> tuple[Path, Path]:
    """Return the file of a case that is to be tampered with, and a name that must not change by it."""
    blob = blobs(store)[sha256(case.body)]
    files = [store / crawl.files[origin.url(path)]["path"] for path in case.paths]
    [link] = [path for path in files if path.samefile(blob)]  # rule 13: only the first name is
    [copy] = [path for path in files if path != link]
    return {"blob": (blob, copy), "link": (link, copy), "copy": (copy, link)}[case.target]


@pytest.fixture(scope="module", params=["root", pytest.param("ordinary", marks=pytest.mark.soak)])
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    if request.param == "root" and os.geteuid() != 0:
        pytest.skip("what root writes can be tried by root only; CI runs as root")
    prefix = ORDINARY if request.param == "ordinary" and os.geteuid() == 0 else []
    store, origin = tmp_path_factory.mktemp("tampered") / "store", Origin()
    for case in CASES:
        for path in case.paths:
            origin.put(path, case.body)
    first = run_crawl([origin.url(path) for case in CASES for path in case.paths], store, prefix=prefix)
    done = Ran(store, origin, first, {}, {}, {})
    for case in CASES:
        path, other = chosen(store, first, origin, case)
        WAYS[case.way](path)
        assert other.read_bytes() == case.body
        done.others[case.name] = (other, other.stat().st_ino)
    for then, settings in NEXT.items():
        origin.forget()
        urls = [origin.url(path) for case in CASES if case.then == then for path in case.paths]
        # in order: the twin of each file comes before or after it for certain
        in_order = settings | {"CONCURRENT_ITEMS": 1}
        done.crawls[then] = run_crawl(urls, store, settings=in_order, prefix=prefix)
        done.asked[then] = [asked.path for asked in origin.requests]
    yield done
    origin.close()


def warnings(crawl: Crawl) -> list[str]:
    """Return our warnings, and whatever is worse."""
    return re.findall(r"^.*(?:\[scrapy_streaming\S*\] WARNING|ERROR|CRITICAL): .*$", crawl.log, re.MULTILINE)


# all cases in one test each: the crawls that they look at are made once for each process of tests


@pytest.mark.proves("F18")
def test_only_the_origins_bytes_are_reported_and_one_warning_names_the_file(ran: Ran) -> None:
    """R77, F18, S4."""
    stored = blobs(ran.store)
    said = {then: warnings(crawl) for then, crawl in ran.crawls.items()}
    for case in CASES:
        _is_right_and_said_once(ran, case, stored[sha256(case.body)], said[case.then])


def _is_right_and_said_once(ran: Ran, case: Case, blob: Path, said: list[str]) -> None:
    crawl = ran.crawls[case.then]
    for path in case.paths:
        entry = crawl.files[ran.origin.url(path)]
        assert entry["checksum"] == sha256(case.body)
        assert (ran.store / entry["path"]).read_bytes() == case.body
        assert entry["path"] == ran.first.files[ran.origin.url(path)]["path"]
    assert blob.read_bytes() == case.body
    digest, names = sha256(case.body), [crawl.files[ran.origin.url(p)]["path"] for p in case.paths]
    about = [line for line in said if digest in line or any(name in line for name in names)]
    assert len(about) == 1, about
    assert f": {case.says}: " in about[0]
    lost = case.says in ("bad-blob", "bad-name")  # who is gone is made again; what is another may be newer
    asked = [path for path in ran.asked[case.then] if path in case.paths]
    assert (len(asked) > 0) is (lost or case.then == "always")


def test_the_other_bytes_are_kept_in_quarantine(ran: Ran) -> None:
    """Rule 13b: what somebody wrote into a file is not thrown away."""
    kept = defaultdict(list)
    for path in (ran.store / ".streaming" / "quarantine").iterdir():
        kept[path.name.partition(".")[0]].append(path)
    for case in CASES:
        if case.way != "deleted":
            [file] = kept[sha256(case.body)]
            assert file.read_bytes() != case.body, case.name


def test_no_second_file_changes(ran: Ran) -> None:
    """Rule 13, S4: seen right after the tampering too, by the fixture; a good name is not even made again."""
    for case in CASES:
        other, inode = ran.others[case.name]
        assert other.read_bytes() == case.body, case.name
        if case.says in ("bad-name", "name-missing"):
            assert other.stat().st_ino == inode, case.name


def test_statistics_count_what_was_tampered_with(ran: Ran) -> None:
    for then, crawl in ran.crawls.items():
        for word in ("bad-blob", "blob-missing", "bad-name", "name-missing"):
            expected = sum(case.says == word for case in CASES if case.then == then)
            assert crawl.stat(f"streaming/tampered/{word}") == expected


def test_files_can_be_written_as_stocks_can(ran: Ran) -> None:
    """Rule 13, E10."""
    for path in (*names(ran.store), *blobs(ran.store).values()):
        assert stat.S_IMODE(path.stat().st_mode) & 0o200


# -- nothing was touched -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "copy"])
def test_a_crawl_of_an_untouched_store_reads_no_file(origin: Origin, store: Path, mode: str) -> None:
    """Rule 13b: our own links, renames and unlinks are in the stamps; without any each file is read once."""
    bodies = {f"/{n}.bin": random.Random(n // 2).randbytes((SMALL, LARGE)[n % 4 // 2]) for n in range(16)}
    urls = [origin.put(path, body) for path, body in bodies.items()]

    def read(**settings: str) -> int:
        crawl = run_crawl(urls, store, settings={"STREAMING_LINK_MODE": mode, **settings})
        assert {entry["status"] for entry in crawl.files.values()} == {"uptodate"}
        assert warnings(crawl) == []
        return int(crawl.stat("streaming/files_hashed"))

    first = run_crawl(urls, store, settings={"STREAMING_LINK_MODE": mode})
    assert len(first.files) == len(urls)
    assert warnings(first) == []
    assert read() == 0
    assert read(STREAMING_REVALIDATE="always") == 0
    assert read() == 0
    with closing(sqlite3.connect(store / ".streaming" / "ledger.sqlite3")) as connection, connection:
        connection.execute("UPDATE ss_blob SET stamp = NULL")
        connection.execute("UPDATE ss_completion SET stamp = NULL")
    copies = len(urls) - (len(urls) // 2 if mode == "auto" else 0)
    assert read() >= len(urls) // 2 + copies
    assert read() == 0


# -- beside stock ------------------------------------------------------------------------------


@pytest.mark.parametrize("user", ["root", pytest.param("ordinary", marks=pytest.mark.soak)])
def test_files_pipeline_refreshes_over_our_store_and_we_go_on(origin: Origin, store: Path, user: str) -> None:
    """C6, rule 13, R77: it writes through names, those that are links too; no other file changes by it."""
    if user == "root" and os.geteuid() != 0:
        pytest.skip("what root writes can be tried by root only; CI runs as root")
    prefix = ORDINARY if user == "ordinary" and os.geteuid() == 0 else []
    old = {n: random.Random(n).randbytes(SMALL + n) for n in range(12)}
    new = {n: body if n % 3 == 0 else random.Random(-n - 1).randbytes(SMALL + n) for n, body in old.items()}
    pairs = {n: [origin.put(f"/{n}/{twin}.bin", old[n]) for twin in (1, 2)] for n in old}
    first = run_crawl([url for pair in pairs.values() for url in pair], store, prefix=prefix)
    refreshed, others = {}, {}
    for n, pair in pairs.items():
        blob = blobs(store)[sha256(old[n])]
        pair.sort(key=lambda url, blob=blob: not (store / first.files[url]["path"]).samefile(blob))
        refreshed[n], others[n] = pair if n % 2 else reversed(pair)  # the link, the copy
        origin.put(urlsplit(refreshed[n]).path, new[n])
    stock = {"ADDONS": {}, "ITEM_PIPELINES": {"scrapy.pipelines.files.FilesPipeline": 1}, "FILES_EXPIRES": 0}
    back = run_crawl(list(refreshed.values()), store, settings=stock, prefix=prefix)
    assert back.stat("file_status_count/downloaded") == len(refreshed)
    for n, body in old.items():
        assert (store / first.files[refreshed[n]]["path"]).read_bytes() == new[n]
        assert (store / first.files[others[n]]["path"]).read_bytes() == body
    fresh = run_crawl(list(refreshed.values()), store, prefix=prefix)
    changed = [n for n in old if n % 3]
    assert len(warnings(fresh)) == sum(n % 2 for n in changed), "of links: their blobs were written to"
    for n in old:
        entry = fresh.files[refreshed[n]]
        data = (store / entry["path"]).read_bytes()
        assert entry["checksum"] == sha256(data)
        assert data == new[n], "never turned back"
        assert blobs(store)[sha256(data)].read_bytes() == data
    always = {"STREAMING_REVALIDATE": "always"}
    last = run_crawl(list(refreshed.values()), store, settings=always, prefix=prefix)
    assert warnings(last) == []
    for n, body in old.items():
        assert (store / last.files[refreshed[n]]["path"]).read_bytes() == new[n]
        assert last.files[refreshed[n]]["checksum"] == sha256(new[n])
        assert (store / first.files[others[n]]["path"]).read_bytes() == body


def test_images_pipeline_in_the_same_store_changes_no_other_file(origin: Origin, store: Path) -> None:
    """Rule 13, R77: it encodes anew and writes under the very name that we gave."""
    bodies = {}
    for n in range(4):
        buffer = io.BytesIO()
        Image.new("RGB", (40, 40), (n * 60, 0, 0)).save(buffer, "PNG")
        bodies |= {origin.put(f"/{n}/{twin}.jpg", buffer.getvalue()): buffer.getvalue() for twin in (1, 2)}
    first = run_crawl(list(bodies), store)
    shared = {url: (store / entry["path"]).stat().st_nlink for url, entry in first.files.items()}
    links = [url for url in bodies if shared[url] == 2]
    assert len(links) == 4
    stock = {"ADDONS": {}, "ITEM_PIPELINES": {"scrapy.pipelines.images.ImagesPipeline": 1}}
    stock |= {"IMAGES_STORE": str(store), "IMAGES_EXPIRES": 0}
    run_crawl([{"image_urls": [url]} for url in links], store, settings=stock)
    for url, body in bodies.items():
        assert ((store / first.files[url]["path"]).read_bytes() == body) is (url not in links)
    again = run_crawl(list(bodies), store)
    assert len(warnings(again)) == len(links)
    for url, body in bodies.items():
        assert_stored(store, again.files[url], body)
