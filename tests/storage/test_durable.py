"""Whole files, locks and the errors of a disk, once for all of storage."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scrapy_streaming.exceptions import WriteFailed
from scrapy_streaming.storage import durable


def failing(number: int) -> Callable[..., Any]:
    def call(*_: object, **__: object) -> Any:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize(("write", "wins"), [(durable.replace_file, "new"), (durable.create_file, "old")])
def test_of_two_writers_one_file_stays_whole(tmp_path: Path, write: Callable[..., None], wins: str) -> None:
    path = tmp_path / "a.json"
    for text in ("old", "new"):
        write(path, text, fsync=True)
    assert path.read_text() == wins
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EMLINK, errno.ENOTSUP])
def test_without_hard_links_a_file_is_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "link", failing(number))
    durable.create_file(tmp_path / "a.json", "text", fsync=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("write", [durable.replace_file, durable.create_file])
@pytest.mark.parametrize("step", ["fsync", "write"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., None], step: str
) -> None:
    """F8, F9."""
    path = tmp_path / "a.json"
    path.write_text("old")
    if step == "fsync":
        monkeypatch.setattr(os, "fsync", failing(errno.EIO))
        text = "new"
    else:
        text = "\ud800"  # no UTF-8: the stream refuses it
    with pytest.raises((OSError, UnicodeEncodeError)):
        write(path, text, fsync=True)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_stream_that_is_broken_off_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def write() -> None:
        with durable.whole_file(path, fsync=False) as stream:
            stream.write("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.ENOSPC, "no-space"), (errno.EDQUOT, "no-space"), (errno.EIO, "write-failed")],
)
def test_an_error_of_the_disk_has_its_reason(number: int, reason: str) -> None:
    with pytest.raises(WriteFailed, match="cannot write it: ") as caught, durable.writing("cannot write it"):
        failing(number)()
    assert caught.value.reason == reason


@pytest.mark.parametrize(("number", "reason"), [(errno.EIO, "sync-failed"), (errno.ENOSPC, "no-space")])
def test_a_sync_that_fails_has_its_reason(monkeypatch: pytest.MonkeyPatch, number: int, reason: str) -> None:
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, failing(number))
    for call in (lambda: durable.sync(0), lambda: durable.sync_data(0, "cannot write it")):
        with pytest.raises(WriteFailed) as caught:
            call()
        assert caught.value.reason == reason


def test_a_lock_is_held_by_one_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with durable.locked(path):
        fd = os.open(path, os.O_RDONLY)
        assert not durable.try_lock(fd)
    assert durable.try_lock(fd)
    os.close(fd)
