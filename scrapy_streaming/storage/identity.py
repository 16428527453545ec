"""The identity of a store: its file ``store.json``, and how a damaged one is replaced.

What may live here: reading, making and updating ``store.json`` (storage rules 1 and 13c).
"""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from scrapy_streaming.exceptions import LedgerError, StoreError
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage import durable
from scrapy_streaming.storage.leftovers import Leftover, leftovers_in
from scrapy_streaming.storage.locations import has_ledger, ledger_url

STORE_FORMAT: Final = 1
#: What a damaged ``store.json`` is made anew from.
FROM_LEDGER: Final = "the ledger"
FROM_NOTHING: Final = "nothing, with a new id; a crawl reads and records the blobs"
#: Bytes of ``store.json`` that are read at most.
_LONGEST: Final = 1 << 16
_ASIDE: Final = re.compile(r"(?:store|metrics)\.[0-9a-f]{16}\.tmp", re.ASCII)


@dataclass(frozen=True, slots=True)
class Identity:
    """The content of ``store.json``: the ids of the store and of its ledger, and the ledger's epoch.

    ``ledger_id``, ``None`` before the first ledger, shows that a missing ledger existed, so that none is
    silently made anew. The epoch, which the ledger has too, shows that a ledger is an older copy (I16).
    ``unrecorded``: a crawl without the ledger stored blobs that the ledger does not have.
    """

    store_id: str
    ledger_id: str | None = None
    epoch: int = 0
    unrecorded: bool = False


def leftovers(directory: Path) -> Iterator[Leftover]:
    """Yield temporary files of ``store.json`` and the metrics, left by killed processes."""
    return leftovers_in(directory, _ASIDE)


# -- reading ---------------------------------------------------------------------------------


def read_identity(directory: Path) -> Identity:
    """Return the content of ``store.json``; raise ``StoreError`` if it is missing, damaged or unreadable."""
    found = find_identity(directory)
    if found is None:
        msg = f"{directory / 'store.json'} is damaged: the next crawl makes it anew"
        raise StoreError(msg, reason="store-format")
    return found


def find_identity(directory: Path) -> Identity | None:
    """Return the content of ``store.json``, ``None`` if it is missing, empty or damaged.

    Raises ``StoreError`` if it is not a regular file, cannot be read, or has another format number.
    """
    path = directory / "store.json"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            text = os.read(fd, _LONGEST) if stat.S_ISREG(os.fstat(fd).st_mode) else None
        finally:
            os.close(fd)
    except FileNotFoundError:
        return None
    except OSError as error:
        msg = f"{path} cannot be read: {error.strerror}"
        raise StoreError(msg, reason="store-not-writable") from error
    if text is None:
        msg = f"{path} is not a regular file: move it away"
        raise StoreError(msg, reason="store-unsafe")
    number, found = _parse(text)
    if found is not None and number != STORE_FORMAT:
        msg = (
            f"{path} has store format {number}, this version writes {STORE_FORMAT}: "
            "install the version that made it"
        )
        raise StoreError(msg, reason="store-format")
    return found


def _parse(text: bytes) -> tuple[Any, Identity | None]:
    """Return the format number and the identity; ``None`` as the identity if the text is damaged."""
    try:
        document = json.loads(text)
        number, store_id = document["format"], document["store_id"]
        ledger_id, epoch = document.get("ledger_id"), document.get("epoch", 0)
        unrecorded = document.get("unrecorded", False) is True
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, None
    sound = isinstance(store_id, str) and isinstance(ledger_id, str | None) and isinstance(epoch, int)
    if number == STORE_FORMAT and not (sound and store_id):
        return number, None
    return number, Identity(store_id, ledger_id, epoch, unrecorded)


# -- writing ---------------------------------------------------------------------------------


def open_identity(
    settings: StreamingSettings, directory: Path, *, write: bool, rebuild: bool
) -> tuple[Identity, str]:
    """Return the store's identity, and the source of a damaged one that was made anew, else ``""``.

    The first process creates it (storage rule 1). A damaged one is made anew from the ids in the ledger, or
    from nothing if there is no ledger (storage rule 13c), and written only with *write*. With *rebuild* the
    ledger may be unreadable. Raises ``StoreError``, ``LedgerError``, ``OSError``.
    """
    if not os.path.lexists(directory / "store.json") and not has_ledger(settings):
        write_identity(directory, Identity(secrets.token_hex(16)), fsync=settings.fsync, create=True)
    if (found := find_identity(directory)) is not None:
        return found, ""
    with durable.locked(directory / "store.lock"):
        if (found := find_identity(directory)) is not None:  # another process was first
            return found, ""
        made, source = _make_anew(settings, directory, rebuild=rebuild)
        if write:
            write_identity(directory, made, fsync=settings.fsync)
    return made, source


def _make_anew(settings: StreamingSettings, directory: Path, *, rebuild: bool) -> tuple[Identity, str]:
    """Return an identity in place of a damaged one, and its source.

    Raises ``LedgerError`` if the ledger cannot be read, unless *rebuild*.
    """
    if settings.why_no_ledger is not None:  # the ledger's id is compared when it is switched on again
        return Identity(secrets.token_hex(16)), FROM_NOTHING
    from scrapy_streaming.storage.ledger import recorded_identity

    try:
        recorded = recorded_identity(ledger_url(settings, directory))
    except LedgerError as error:
        if error.reason != "ledger-missing" and not rebuild:
            raise
        recorded = None
    if recorded is None:
        return Identity(secrets.token_hex(16)), FROM_NOTHING
    return Identity(*recorded), FROM_LEDGER


def update_identity(
    directory: Path, ledger_id: str | None, epoch: int, *, fsync: bool, unrecorded: bool | None = None
) -> None:
    """Write the ledger's id and epoch into ``store.json``; the epoch there is never lowered.

    Call it after the ledger has committed that epoch, so that ``store.json`` is never ahead of its ledger.
    *ledger_id* and *unrecorded* stay as they are if ``None``. *unrecorded*: the ledger does not have all
    that is stored, and the next crawl with a ledger reads the store. Raises ``StoreError``.
    """
    path = directory / "store.json"
    try:
        with durable.locked(directory / "store.lock"):
            found = read_identity(directory)
            wanted = replace(
                found,
                ledger_id=ledger_id or found.ledger_id,
                epoch=max(found.epoch, epoch),
                unrecorded=found.unrecorded if unrecorded is None else unrecorded,
            )
            if wanted != found:
                write_identity(directory, wanted, fsync=fsync)
    except OSError as error:
        msg = f"{path} cannot be written: {error.strerror}"
        raise StoreError(msg, reason="store-not-writable") from error


def write_identity(directory: Path, identity: Identity, *, fsync: bool, create: bool = False) -> None:
    """Write ``store.json``, with *create* only if it is missing; raise ``OSError``."""
    write = durable.create_file if create else durable.replace_file
    text = json.dumps({"format": STORE_FORMAT, **asdict(identity)}) + "\n"
    write(directory / "store.json", text, fsync=fsync, mode=0o666)
