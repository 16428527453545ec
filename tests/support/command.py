"""``scrapy streaming …`` in a process of its own, by Scrapy's own command line.

What may live here: running a command and checking how it ended. ``python -m support.command`` is ``scrapy``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from scrapy.settings import Settings

from scrapy_streaming.cli import registry
from support.launch import TESTS, launch

if TYPE_CHECKING:
    from scrapy_streaming.settings import StreamingSettings

#: ``python -m support.command`` is ``scrapy``, with the command as its entry point would bring it, whether
#: or not the package is installed.
COMMAND = [sys.executable, "-m", "support.command"]


def environment() -> dict[str, str]:
    """Return the environment of :data:`COMMAND`, without any setting."""
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    return {k: v for k, v in os.environ.items() if not k.startswith("SCRAPY_")} | {"PYTHONPATH": path}


def scrapy(*arguments: str, env: dict[str, str] | None = None, cwd: Path) -> subprocess.CompletedProcess[str]:
    if env is not None:  # some of it is read by imports
        return subprocess.run(
            [*COMMAND, *arguments],
            env=environment() | env, cwd=cwd, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "output", Path(folder) / "errors"
        process = launch(
            "support.command", arguments, env=environment(), cwd=cwd, output=output, errors=errors
        )
        code = process.wait(60)
        return subprocess.CompletedProcess(process.args, code, output.read_text(), errors.read_text())


def streaming(store: Path, *arguments: str, url: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a verb on *store*, with the ledger that *url* names."""
    options = ["-s", f"FILES_STORE={store}", *(["-s", f"STREAMING_DATABASE_URL={url}"] if url else [])]
    return scrapy("streaming", *options, *arguments, cwd=store.parent)


def ok(done: subprocess.CompletedProcess[str], code: int = 0) -> str:
    """Return what a command printed; fail unless it ended with *code*, and without a traceback."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def run_here(verb: str, settings: StreamingSettings, **options: object) -> int:
    """Run a verb in this process, printing JSON; return its exit code."""
    invocation = registry.Invocation(Settings(), settings, Namespace(**options), as_json=True)
    return registry.load(verb).run(invocation)


def main() -> None:
    from scrapy import cmdline

    from scrapy_streaming.cli.command import StreamingCommand

    cmdline._get_commands_from_entry_points = lambda *args, **kwargs: {"streaming": StreamingCommand()}
    sys.argv[0] = "scrapy"
    cmdline.execute()


if __name__ == "__main__":
    main()
