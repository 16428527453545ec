"""Hooks and middlewares of ordinary projects that once cost a file, or brought another's (R76, C9)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from support.crawl import assert_stored, blobs, run_crawl, sha256
from support.origin import Answer, Origin
from support.variants import by_language, text_in

BODY = random.Random("others").randbytes(700_000)


def pipeline(name: str) -> dict[str, Any]:
    return {"ITEM_PIPELINES": {f"support.components.{name}": 1}}


def test_what_a_hook_writes_by_the_store_is_the_file(origin: Origin, store: Path) -> None:
    """R76: other bytes than came are stored, no name of an older blob changes, and no 304 keeps them."""
    own, same = origin.put("/own.bin", BODY), origin.put("/same.bin", BODY)
    for body in (BODY, BODY[::-1]):
        origin.put("/own.bin", body)
        settings = pipeline("Persisting") | {"STREAMING_REVALIDATE": "always"}
        crawl = run_crawl([own, same], store, settings=settings)
        entry = crawl.files[own]
        assert (store / entry["path"]).read_bytes() == b"mine: " + body
        assert (entry["digest"], entry["reason"]) == (f"sha256:{sha256(b'mine: ' + body)}", "transformed")
        assert (store / crawl.files[same]["path"]).read_bytes() == BODY
        for name, path in blobs(store).items():
            assert sha256(path.read_bytes()) == name


def test_a_large_file_that_a_hook_refuses_is_fetched_again(origin: Origin, store: Path) -> None:
    """C9: by an error of any kind; once refused its part is not offered to the next crawl."""
    page = b"<h1>Log in</h1>" + BODY
    url = origin.put("/picky.bin", BODY, Answer(200, {"ETag": '"p"'}, page))
    assert run_crawl([url], store, settings=pipeline("Picky")).files == {}
    crawl = run_crawl([url], store, settings=pipeline("Picky"))
    assert_stored(store, crawl.files.get(url), BODY)


def test_a_head_brings_no_file(origin: Origin, store: Path) -> None:
    """As stock: refused, and what was stored before stays."""
    url = origin.put("/head.bin", BODY)
    run_crawl([url], store)
    crawl = run_crawl([url], store, settings=pipeline("Heads") | {"STREAMING_REVALIDATE": "always"})
    assert crawl.files == {}
    assert crawl.stat("streaming/failed/empty-content") == 1
    (name,) = (path for path in (store / "full").iterdir())
    assert name.read_bytes() == BODY


def test_an_expected_digest_is_compared_whichever_item_came_first(origin: Origin, store: Path) -> None:
    """E9: two items of one crawl with one URL, and only one of them with a digest."""
    url = origin.put("/twice.bin", BODY)
    wrong = f"{url}#sha256={'0' * 64}"
    crawl = run_crawl([url, wrong], store)
    assert set(crawl.files) == {url}
    assert crawl.stat("streaming/failed/digest-mismatch") == 1


@pytest.mark.parametrize("order", [543, 700])
def test_what_a_middleware_made_is_given_to_the_requests_that_select_it(
    origin: Origin, store: Path, order: int
) -> None:
    """R40, R76: the new response has no Vary, and still comes of the variant that was asked for."""
    url = origin.put("/varied", b"", default=by_language("Accept-Language"))
    for language in ("de", "en"):
        settings = {
            "DEFAULT_REQUEST_HEADERS": {"Accept-Language": language},
            "DOWNLOADER_MIDDLEWARES": {"support.components.Decrypting": order},
        }
        crawl = run_crawl([url], store, settings=settings)
        assert (store / crawl.files[url]["path"]).read_bytes() == text_in(language)[::-1]
