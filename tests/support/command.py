"""``scrapy streaming …`` in a process of its own, by Scrapy's own command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# the command as its entry point would bring it, whether or not the package is installed
SCRAPY = """
import sys
from scrapy import cmdline
from scrapy_streaming.commands import StreamingCommand
cmdline._get_commands_from_entry_points = lambda *args, **kwargs: {"streaming": StreamingCommand()}
sys.argv = ["scrapy", *sys.argv[1:]]
cmdline.execute()
"""


def scrapy(*arguments: str, env: dict[str, str] | None = None, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SCRAPY_")} | (env or {})
    return subprocess.run(
        [sys.executable, "-c", SCRAPY, *arguments],
        env=environment, cwd=cwd, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def streaming(store: Path, *arguments: str, url: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a verb on *store*, with the ledger that *url* names."""
    options = ["-s", f"FILES_STORE={store}", *(["-s", f"STREAMING_DATABASE_URL={url}"] if url else [])]
    return scrapy("streaming", *options, *arguments, cwd=store.parent)
