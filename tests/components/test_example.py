"""The example's spider on a real listing (S7): everything in the tree is stored, and nothing else."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

from support.crawl import sha256
from support.servers import WebServer

EXAMPLE = Path(__file__).parents[2] / "example_project"
NAMES = (
    "a.pdf", "README", "empty", "with space.txt", "größe.csv", "config-3.11-x86/setup.py",
    "deep/er/still/x.zip", "config-3.11-x86/Makefile", "a" * 90 + ".bin",
)  # fmt: skip


def test_everything_in_a_listing_is_stored(web: WebServer, tmp_path: Path) -> None:
    """Folders with dots in their names are folders, files without an extension are files."""
    bodies = {name: random.Random(name).randbytes(100 + len(name)) for name in NAMES} | {"empty": b""}
    for name, body in bodies.items():
        web.put(f"tree/{name}", body)
    project = tmp_path / "example"
    shutil.copytree(EXAMPLE, project, ignore=shutil.ignore_patterns(".origin", "downloads"))
    out = tmp_path / "items.jsonl"
    command = [
        sys.executable,
        "-m",
        "scrapy",
        "crawl",
        "documents",
        "-a",
        f"url={web.url('tree/')}",
        "-O",
        str(out),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SCRAPY_")}
    crawl = subprocess.run(
        command, cwd=project, capture_output=True, text=True, timeout=60, env=environment, check=True
    )
    entries = [file for line in out.read_text().splitlines() for file in json.loads(line)["files"]]
    assert sorted(e["digest"] for e in entries) == sorted(f"sha256:{sha256(b)}" for b in bodies.values())
    assert f"files         {len(NAMES)} " in crawl.stdout
    for entry in entries:
        assert f"sha256:{sha256((project / 'downloads' / entry['path']).read_bytes())}" == entry["digest"]
