"""Pattern 4, persistent state: a list of files that is worked off, over as many runs as it takes.

python persistent_state.py before|after URL FOLDER [URL …]
"""

import json
import sys
from pathlib import Path

import requests

from scrapy_streaming.integration import check_database_health, download, get_streaming_database


def before(urls: list[str], folder: Path) -> dict[str, str]:
    """Note what is done at the end: a crash forgets all of it, and half files count as done."""
    notes = folder / "done.json"
    done = json.loads(notes.read_text()) if notes.exists() else {}
    for number, url in enumerate(urls):
        if url not in done:
            path = folder / f"{number}.bin"
            path.write_bytes(requests.get(url, timeout=60).content)
            done[url] = str(path)
    notes.write_text(json.dumps(done))
    return done


def after(urls: list[str], folder: Path) -> dict[str, str]:
    """Let the store's ledger say what is done; what is not is gone on with."""
    store = folder / "store"
    done = {}
    with requests.Session() as session:
        for url in urls:
            entry = download(url, store=store, client=session, progress_callback=show)
            if entry is None:  # SCRAPY_STREAMING_ENABLED=0: as it was
                return before(urls, folder)
            print(entry["status"], entry["resumed_from"], url, flush=True)
            done[url] = str(store / entry["path"])
    ledger = f"sqlite:///{store / '.streaming' / 'ledger.sqlite3'}"
    health = check_database_health(ledger)
    if health is not None and health["status"] != "healthy":
        print("look at the ledger:", *health["errors"], file=sys.stderr)
    with get_streaming_database(ledger) as db:
        if db is not None:
            print("recorded", db.counts().result()["done"], flush=True)
    return done


def show(had: int, total: int | None) -> None:
    print(had, flush=True)


if __name__ == "__main__":
    how, url, folder, *more = sys.argv[1:]
    print("stored", (before if how == "before" else after)([url, *more], Path(folder)))
