"""Pattern 2, the bytes too: decide, receive, publish; the request is still yours.

python streaming_io.py before|after URL FOLDER
"""

import sys
from pathlib import Path

import httpx

from scrapy_streaming.integration import (
    try_streaming_finalization,
    try_streaming_io,
    try_streaming_resume_decision,
)


def before(url: str, folder: Path) -> Path:
    """Write under the final name: who looks meanwhile, or after a crash, finds half a file."""
    path = folder / "report.bin"
    with httpx.stream("GET", url) as response, path.open("wb") as file:
        response.raise_for_status()
        for chunk in response.iter_bytes():
            file.write(chunk)
    return path


def after(url: str, folder: Path) -> Path:
    """Let the part carry what one try has to know of the one before, also over a crash."""
    part = folder / "report.part"
    decision = try_streaming_resume_decision(None, part, url=url)
    if decision is None:  # SCRAPY_STREAMING_RESUME_ENABLED=0: as it was
        return before(url, folder)
    if decision.mode != "cached" or decision.headers:
        with httpx.stream("GET", url, headers=decision.headers) as response:
            metrics = try_streaming_io(response, part, progress_callback=show)
        if metrics is None:  # SCRAPY_STREAMING_IO_ENABLED=0
            return before(url, folder)
    artifact = try_streaming_finalization(part, store=folder / "store", name="report.bin")
    return before(url, folder) if artifact is None else artifact.path


def show(had: int, total: int | None) -> None:
    print(had, flush=True)


if __name__ == "__main__":
    how, url, folder = sys.argv[1:]
    print("stored", (before if how == "before" else after)(url, Path(folder)))
