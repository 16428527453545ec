"""What was planted in the place of a file of the store's is refused at once and not touched (E2, F24)."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command import streaming
from support.crawl import run_crawl
from support.stores import settings_for

from scrapy_streaming.exceptions import LedgerError, StoreError, StreamingError
from scrapy_streaming.storage.store import Storage, Use, check_store

LEDGER = [f"ledger.sqlite3{end}" for end in ("", "-journal", "-wal", "-shm", "-turn")]
#: The others open the store as ``health`` does.
VERBS = ("status", "health", "migrate", "rebuild")
NAMES = [*LEDGER, "store.json", "store.lock", "maintenance.lock"]


def link(path: Path) -> None:
    target = path.parent.parent.parent / "target"
    target.write_bytes(b"of others")
    path.symlink_to(target)


def sock(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        folder = os.open(path.parent, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{folder}/{path.name}")  # the path itself may be too long for a socket
        os.close(folder)


def device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices; CI runs as root")


KINDS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "pipe": ("a pipe", os.mkfifo),
    "link": ("a link", link),
    "socket": ("a socket", sock),
    "directory": ("a directory", Path.mkdir),
    "device": ("a device", device),
}


def within_a_second(call: Callable[[], object]) -> StreamingError:
    """Return what *call* raises; a thread that hangs is left behind."""
    raised: list[StreamingError] = []

    def run() -> None:
        try:
            call()
        except StreamingError as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(1)
    assert not thread.is_alive(), "it hangs"
    assert raised, "it was not refused"
    return raised[0]


def everything(store: Path) -> list[tuple[str, int, int]]:
    found = [(str(path), path.lstat()) for path in sorted([*store.rglob("*"), store.parent / "target"])
             if os.path.lexists(path)]  # fmt: skip
    return [(name, info.st_ino, info.st_mtime_ns) for name, info in found]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("pristine") / "store"
    Storage.open(settings_for(store)).close()
    return store


@pytest.fixture
def made(pristine: Path, tmp_path: Path) -> Path:
    """A store that a crawl made, and closed."""
    return shutil.copytree(pristine, tmp_path / "store")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_file_is_refused_at_once_and_not_touched(made: Path, name: str, kind: str) -> None:
    path = made / ".streaming" / name
    path.unlink(missing_ok=True)
    word, plant = KINDS[kind]
    plant(path)
    before = everything(made)
    settings = settings_for(made)
    calls: list[Callable[[], object]] = [lambda: check_store(settings)]
    calls += [lambda use=use: Storage.open(settings, use) for use in Use]
    for call in calls:
        error = within_a_second(call)
        assert isinstance(error, StoreError | LedgerError)
        assert str(error).startswith(f"{path} is {word}, not a plain file")
    assert everything(made) == before


@pytest.mark.parametrize("kind", ["pipe", "link"])
@pytest.mark.parametrize("end", ["", "-journal", "-wal"])
def test_a_ledger_elsewhere_is_looked_at_too(made: Path, kind: str, end: str) -> None:
    (made.parent / "db" / "x").mkdir(parents=True)
    ledger = made.parent / "db" / "x" / "l.sqlite3"
    planted = ledger.with_name(ledger.name + end)
    KINDS[kind][1](planted)
    settings = settings_for(made, STREAMING_DATABASE_URL=f"sqlite:///{ledger}")
    assert str(planted) in str(within_a_second(lambda: Storage.open(settings)))


@pytest.mark.parametrize("name", ["ledger.sqlite3-journal", "store.json"])
def test_crawl_and_verbs_end_with_one_line(made: Path, name: str) -> None:
    path = made / ".streaming" / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    before = everything(made)
    crawl = run_crawl([], made, check=False, timeout=20)
    assert crawl.code == 1
    (line,) = crawl.log.strip().splitlines()
    assert f"{path} is a pipe, not a plain file" in line
    for verb in VERBS:
        done = streaming(made, *verb.split())
        assert done.returncode == 1, verb
        said = [text for text in (done.stdout + done.stderr).splitlines() if "a pipe" in text]
        assert len(said) == 1, verb
        assert f"{path} is a pipe, not a plain file" in said[0]
    assert everything(made) == before
