"""A disk that fills up in the middle of a crawl: what fits is stored, the rest waits or is kept (C21, R9)."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.beside import loud
from support.crawl import Crawl, assert_sound, kept, run_crawl, sha256, wait_until
from support.origin import Answer, Asked, Origin, Resource, honest

MIB = 1 << 20
DISK = 48 * MIB
RESERVE = 12 * MIB

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0,
    reason="a disk is made full by mounting a small tmpfs, which needs root; CI runs as root",
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small filesystem, with ballast of 20 MiB on it."""
    where = tmp_path / "disk"
    where.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(where)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here, so no disk can be made full: {mounted.stderr!r}")
    (where / "ballast").write_bytes(bytes(20 * MIB))
    yield where
    subprocess.run(["umount", "--lazy", str(where)], check=True)


def slowly(asked: Asked, resource: Resource) -> Answer:
    """Chunked: nobody knows how long it is."""
    return honest(asked, resource, chunked=True, length=None, pace=0.02, piece=256 << 10)


def site(origin: Origin) -> dict[str, bytes]:
    seven = random.Random(7)
    bodies = {f"/small/{number}": seven.randbytes(200_000) for number in range(12)}
    bodies["/big"] = seven.randbytes(25 * MIB)
    return {origin.put(path, body): body for path, body in bodies.items()}


def crawl_onto(disk: Path, urls: Iterable[str], settings: dict[str, Any] | None = None, **how: Any) -> Crawl:
    """Crawl into a store on the small disk; its log and items are elsewhere."""
    here = {"FILES_STORE": str(disk / "store"), "STREAMING_MIN_FREE_BYTES": RESERVE, **(settings or {})}
    return run_crawl(list(urls), disk.parent / "elsewhere", settings=here, **how)


def waits(disk: Path) -> bool:
    """Whether the crawl that runs has said that it waits."""
    logs = disk.parent.glob("crawl-*/stderr")
    return any("what does not fit waits for room" in log.read_text() for log in logs)


def stored(crawl: Crawl, disk: Path) -> set[str]:
    return {url for url, entry in crawl.files.items() if (disk / "store" / entry["path"]).exists()}


def test_what_does_not_fit_goes_on_when_there_is_room(origin: Origin, disk: Path) -> None:
    bodies = site(origin)

    def make_room(process: subprocess.Popen[bytes]) -> None:
        small = disk / "store" / "full"
        wait_until(lambda: small.is_dir() and len(list(small.glob("[!.]*"))) == 12)
        wait_until(lambda: waits(disk))
        (disk / "ballast").unlink()

    crawl = crawl_onto(disk, bodies, meanwhile=make_room)
    assert {url: entry["checksum"] for url, entry in crawl.files.items()} == {
        url: sha256(body) for url, body in bodies.items()
    }
    assert len(loud(crawl)) == 1, loud(crawl)
    assert crawl.stat("streaming/waits_for_space") == 1


def test_without_room_the_rest_fails_in_time_and_the_next_crawl_has_it(origin: Origin, disk: Path) -> None:
    bodies = site(origin)
    big = origin.url("/big")
    crawl = crawl_onto(disk, bodies, {"STREAMING_PATIENCE": 1})
    assert stored(crawl, disk) == bodies.keys() - {big}
    assert crawl.stat("streaming/failed/no-space") == 1
    assert sum("no-space" in line for line in loud(crawl)) == 3, "waits, waited in vain, failed"
    assert "Traceback" not in crawl.log
    (disk / "ballast").unlink()
    again = crawl_onto(disk, bodies)
    assert again.files[big]["checksum"] == sha256(bodies[big])
    assert {entry["status"] for url, entry in again.files.items() if url != big} == {"uptodate"}


def test_a_body_of_unknown_length_ends_at_the_reserve_and_is_resumed(origin: Origin, disk: Path) -> None:
    body = random.Random(3).randbytes(25 * MIB)
    url = origin.put("/endless", body, default=slowly)
    settings = {"STREAMING_PATIENCE": 0.5, "STREAMING_CHECKPOINT_BYTES": MIB}
    crawl = crawl_onto(disk, [url], settings)
    assert crawl.files == {}
    assert crawl.stat("streaming/failed/no-space") == 1
    found = os.statvfs(disk)
    assert found.f_bavail * found.f_frsize >= 2 * MIB, "the reserve was kept, but for what was in a buffer"
    assert_sound(disk / "store", [])
    was = kept(disk / "store")
    assert was > 8 * MIB
    (disk / "ballast").unlink()
    again = crawl_onto(disk, [url], settings)
    assert again.files[url]["checksum"] == sha256(body)
    assert again.files[url]["resumed_from"] == was


def test_a_stop_ends_the_wait(origin: Origin, disk: Path) -> None:
    bodies = site(origin)

    def stop(process: subprocess.Popen[bytes]) -> None:
        wait_until(lambda: waits(disk))
        process.send_signal(signal.SIGINT)

    crawl = crawl_onto(disk, bodies, meanwhile=stop, timeout=30)
    assert "crawl-stopping" in crawl.log
    (disk / "ballast").unlink()
    again = crawl_onto(disk, bodies)
    assert len(again.files) == len(bodies)
