"""No user and no password of a URL, a proxy or a project gets to disk or into a line of the log (E7)."""

from __future__ import annotations

import base64
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command import scrapy, streaming
from support.crawl import Crawl, run_crawl
from support.origin import Answer, Origin

SECRET = "5eKret-Pa55"
#: The secret as it is, percent-encoded, in Basic authentication, and the user beside it.
FORMS = [SECRET, SECRET.replace("-", "%2D"), base64.b64encode(f"me:{SECRET}".encode()).decode()[4:-4]]
VERBS = ("ls", "ls --json", "health", "verify", "gc --dry-run", "status", "requeue --failed")


def hidden(text: str | bytes) -> bool:
    data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    return not any(form.encode() in data for form in FORMS)


def our_lines(crawl: Crawl) -> list[str]:
    return [line for line in crawl.log.splitlines() if "[scrapy_streaming" in line]


def files(folder: Path) -> Iterator[Path]:
    yield from (path for path in folder.rglob("*") if path.is_file())


def urls_with_secrets(origin: Origin) -> list[str]:
    """URLs whose user, whose Location, or whose nested URL has the secret."""
    host = f"127.0.0.1:{origin.port}"
    away = {
        "/absolute": f"http://me:{SECRET}@{host}/x",
        "/nameless": f"http://{SECRET}@{host}/x",
        "/six": f"http://me:{SECRET}@[::1]:{origin.port}/x",
        "/relative": f"//me:{SECRET}@{host}/x",
    }
    moved = [origin.put(p, b"", default=Answer(302, {"Location": to})) for p, to in away.items()]
    return [
        f"http://me:{SECRET}@{host}/a",
        f"http://{SECRET}@{host}/b",
        f"http://me%40home:{FORMS[1]}@{host}/c",
        f"http://me:{SECRET}@[::1]:{origin.port}/d",
        f"https://me:{SECRET}@{host}/e",
        f"http://me:{SECRET}@no-such-host.invalid/f",
        *moved,
    ]


def assert_kept_nowhere(store: Path, crawls: list[Crawl], urls: list[str]) -> None:
    for crawl in crawls:
        assert our_lines(crawl)
        assert [line for line in our_lines(crawl) if not hidden(line)] == []
        assert [name for name in crawl.stats if not hidden(f"{name}={crawl.stats[name]}")] == []
    assert [path for path in files(store) if not hidden(path.read_bytes())] == []
    for arguments in (
        *map(str.split, VERBS),
        ["show", urls[0]],
        ["show", urls[-1]],
        ["show", "--json", urls[0]],
    ):
        done = streaming(store, *arguments)
        assert hidden(done.stdout + done.stderr), arguments


def test_no_credentials_of_a_url_are_stored_or_logged(origin: Origin, store: Path) -> None:
    """Of file_urls and of Location; the second crawl says why it waits."""
    urls = urls_with_secrets(origin)
    good = origin.put("/good", b"good")
    settings = {"RETRY_TIMES": 0, "MEDIA_ALLOW_REDIRECTS": True, "DNS_TIMEOUT": 5}
    crawls = [run_crawl([*urls, good], store, settings=settings) for _ in range(2)]
    assert set(crawls[0].files) == {good}
    assert_kept_nowhere(store, crawls, urls)
    with sqlite3.connect(store / ".streaming" / "ledger.sqlite3") as ledger:
        errors = [row[0] for row in ledger.execute("SELECT error FROM ss_job WHERE error IS NOT NULL")]
    ledger.close()
    assert len(errors) >= len(urls) - 2
    assert any("…@127.0.0.1" in error for error in errors)  # what is left says which host


def test_no_credentials_of_a_proxy_or_a_project_are_stored_or_logged(origin: Origin, store: Path) -> None:
    """A proxy that does not answer, and one that does; HTTPAUTH; a field of the request's own."""
    basic = {"Authorization": f"Basic {base64.b64encode(f'me:{SECRET}'.encode()).decode()}"}
    url = origin.put("/file", b"file")
    origin.put(
        "127.0.0.1:1", b"", default=Answer(407, {"Proxy-Authenticate": f'Basic realm="me:{SECRET}@x"'})
    )
    proxy = origin.url("").replace("http://", f"http://me:{SECRET}@")
    settings = {
        "RETRY_TIMES": 0, "HTTPAUTH_USER": "me", "HTTPAUTH_PASS": SECRET, "HTTPAUTH_DOMAIN": "127.0.0.1",
        "DEFAULT_REQUEST_HEADERS": {"X-Key": f"Bearer {SECRET}"} | basic,
    }  # fmt: skip
    env = {"https_proxy": proxy, "http_proxy": f"http://me:{SECRET}@127.0.0.1:9"}
    crawls = [
        run_crawl([url, "https://127.0.0.1:1/x"], store, settings=settings),
        run_crawl([url, "https://127.0.0.1:1/y", "http://127.0.0.1:9/z"], store, settings=settings, env=env),
    ]
    assert_kept_nowhere(store, crawls, [url])


@pytest.mark.parametrize("verb", ["health", "status", "rebuild"])
def test_no_credentials_of_a_database_are_logged(store: Path, tmp_path: Path, verb: str) -> None:
    (store / ".streaming").mkdir(parents=True)
    (store / ".streaming" / "store.json").write_text('{"format": 1, "store_id": "x"}')
    for url in (f"postgresql+psycopg://me:{SECRET}@127.0.0.1:9/d", f"mysql://me:{SECRET}@h/d"):
        given = ["-s", f"FILES_STORE={store}", "-s", f"STREAMING_DATABASE_URL={url}"]
        done = scrapy("streaming", *given, verb, cwd=tmp_path)
        assert hidden(done.stdout + done.stderr)
