"""Pattern 1, the resume decision alone: your code still makes the request and writes the file.

python resume_decision.py before|after URL FOLDER
"""

import json
import os
import sys
from pathlib import Path

import requests

from scrapy_streaming.integration import try_streaming_resume_decision


def before(url: str, folder: Path) -> Path:
    """Go on where the file ends, if there is one: on faith, whatever the server has by now."""
    path = folder / "report.bin"
    headers = {"Range": f"bytes={path.stat().st_size}-"} if path.exists() else {}
    with requests.get(url, headers=headers, stream=True, timeout=60) as response:
        response.raise_for_status()
        with path.open("ab" if headers else "wb") as file:  # a 200 to a range is appended, too
            for chunk in response.iter_content(65536):
                file.write(chunk)
    return path


def after(url: str, folder: Path) -> Path:
    """Ask as the decision says: Range only with the validator that makes a 206 safe."""
    path, notes = folder / "report.bin", folder / "report.json"
    part = json.loads(notes.read_text()) if notes.exists() else None
    decision = try_streaming_resume_decision(None, part, url=url)
    if decision is None:  # SCRAPY_STREAMING_RESUME_ENABLED=0: as it was
        return before(url, folder)
    with requests.get(url, headers=decision.headers, stream=True, timeout=60) as response:
        response.raise_for_status()
        resumes = response.status_code == 206 and part and response.headers.get("ETag") == part["etag"]
        if response.status_code == 206 and not resumes:
            notes.unlink()  # not what we have the beginning of
            return after(url, folder)
        at = decision.resume_byte_offset if resumes else 0
        total = at + int(response.headers["Content-Length"])
        known = {"url": url, "etag": response.headers.get("ETag"), "total": total}
        with path.open("r+b" if resumes else "wb") as file:
            file.seek(at)
            file.truncate()  # what came behind the last note proves nothing
            for chunk in response.iter_content(65536):
                at += file.write(chunk)
                print(at, flush=True)
                if at % (1 << 20) == 0:  # first the bytes, then the note that vouches for them
                    file.flush()
                    os.fsync(file.fileno())
                    write(notes, {**known, "length": at})
    if at != total:
        raise ConnectionError(f"{at} bytes of {total}")
    notes.unlink(missing_ok=True)
    return path


def write(notes: Path, part: dict[str, object]) -> None:
    aside = notes.with_suffix(".tmp")
    aside.write_text(json.dumps(part))
    aside.replace(notes)


if __name__ == "__main__":
    how, url, folder = sys.argv[1:]
    print("stored", (before if how == "before" else after)(url, Path(folder)))
