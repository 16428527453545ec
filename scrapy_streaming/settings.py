"""The settings: each declared once, all read once into one frozen value.

What may live here: declarations (name, default, what is allowed, help), how a text becomes a value, and
the order of precedence. Every setting may also come from the environment as ``SCRAPY_<NAME>``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

from scrapy_streaming.exceptions import SettingError
from scrapy_streaming.setting_kinds import (
    DATABASE,
    FLAG,
    ITEM_FIELD,
    PATH,
    RATES,
    STORABLE,
    Kind,
    RateRule,
    number_of,
    one_of,
)

#: Scrapy's priority of ``-s NAME=VALUE``, which takes precedence over the environment.
CMDLINE_PRIORITY: Final = 40


class SettingsSource(Protocol):
    """The part of Scrapy's ``BaseSettings`` that is used."""

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value, or *default*."""

    def getpriority(self, name: str) -> int | None:
        """Return the priority it was set with."""

    def __iter__(self) -> Any:
        """Iterate over the names."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: its default, what values it has, its place in the documentation, and its help."""

    default: object
    kind: Kind
    group: str
    help: str


def _setting(default: object, kind: Kind, group: str, text: str) -> Any:
    """Return the dataclass field of a setting, which holds its declaration; *text* is its help."""
    return field(default=default, metadata={"setting": Setting(default, kind, group, text)})


_ON: Final = "What is on"
_PLACES: Final = "Where things are"
_DISK: Final = "Durability and memory"
_LIMITS: Final = "Limits"
_JOBS: Final = "Jobs"
_FAILED: Final = "Failed files"


@dataclass(frozen=True, slots=True)
class StreamingSettings:
    """All settings of one crawl. Times in seconds, sizes in bytes.

    Each field but ``store`` declares the setting ``STREAMING_`` and its name in capitals; the page of
    settings is made of these declarations. ``store`` is the local directory that ``FILES_STORE`` names,
    ``None`` when there is none or it is not a local one.
    """

    enabled: bool = _setting(
        True,
        FLAG,
        _ON,
        "off: Scrapy works as without the add-on. No file and no table is made, and a subclass of "
        "`StreamingFilesPipeline` behaves as one of `FilesPipeline`",
    )
    resume_enabled: bool = _setting(
        True,
        FLAG,
        _ON,
        "conditional and Range fields; off: every download is a plain GET from the first byte",
    )
    io_enabled: bool = _setting(
        True,
        FLAG,
        _ON,
        "bodies are written to disk while they arrive; off: Scrapy buffers them, and the pipeline stores "
        "the buffered body; a stop still breaks them off. Off also accepts [a handler that cannot be "
        "streamed from](handlers.md), without a warning",
    )
    finalization_enabled: bool = _setting(
        True,
        FLAG,
        _ON,
        "bytes are stored by content, under `blobs/`, and names lead to them; off: each name has a file "
        "of its own, written to a temporary file and moved into place whole",
    )
    idempotency_enabled: bool = _setting(
        True,
        FLAG,
        _ON,
        "jobs, leases, effects and completions; off: nothing is recorded but files and parts. A file "
        "under its name is up to date until `FILES_EXPIRES`, as for `FilesPipeline`, and workers do not "
        "know of each other",
    )
    schema_enabled: bool = _setting(
        True,
        FLAG,
        _ON,
        "the database; off: none is opened, and everything that needs one (all of "
        "`STREAMING_IDEMPOTENCY_ENABLED`) is off too",
    )
    dir: str | None = _setting(
        None,
        PATH,
        _PLACES,
        "the folder for parts, quarantine and ledger; by default `.streaming` inside the store. If it is "
        "on another filesystem than the store, publishing copies instead of linking",
    )
    database_url: str | None = _setting(
        None,
        DATABASE,
        _PLACES,
        "the ledger: a file, or (extra `postgres`) a server for workers on [several "
        "machines](workers.md); by default `ledger.sqlite3` in the folder `STREAMING_DIR`. SQLite is "
        "refused on network filesystems",
    )
    link_mode: str = _setting(
        "auto",
        one_of("auto", "reflink", "hardlink", "symlink", "copy", "none"),
        _PLACES,
        "how a name leads to its blob. `auto`: a reflink where the filesystem can, else a hard link for "
        "a blob's first name and a copy for each further one. `none`: there are no names, and `path` is "
        "the blob's own",
    )
    fsync: bool = _setting(
        True,
        FLAG,
        _DISK,
        "off: faster; files survive a killed process, but not a power cut",
    )
    checkpoint_bytes: int = _setting(
        16 << 20,
        number_of(int, 1, "bytes"),
        _DISK,
        "how many bytes may arrive before a checkpoint is made …",
    )
    checkpoint_seconds: float = _setting(
        5.0,
        number_of(float, 0.1, "seconds"),
        _DISK,
        "… and how much time may pass while bytes arrive",
    )
    buffer_bytes: int = _setting(
        8 << 20,
        number_of(int, 1 << 16, "bytes"),
        _DISK,
        "bytes of one download that were received and are not yet written, before its connection is "
        "paused; all downloads together pause at 64 MiB",
    )
    min_rate: int = _setting(
        0,
        number_of(int, 0, "bytes a second", zero="none"),
        _LIMITS,
        "a body that brings fewer bytes over a whole `STREAMING_STALL_TIMEOUT` is broken off "
        "(`too-slow`) and resumed by a retry, perhaps from another machine behind the same host name. "
        "Time in which the crawl itself paused the connection does not count",
    )
    max_rate: tuple[RateRule, ...] | None = _setting(
        None,
        RATES,
        _LIMITS,
        "how fast bodies may arrive, all together: `8000000`. Or rules for one host or for a time of the "
        'local day, `0` for no limit; of several rules that apply, the last one counts: `"2000000, '
        '22:00-06:00 0, example.org 500000"`',
    )
    stall_timeout: float = _setting(
        60.0,
        number_of(float, 0.1, "seconds"),
        _LIMITS,
        "time without a byte after which a body is broken off (`stalled`) and resumed by a retry. A "
        "streamed body has no total deadline; `DOWNLOAD_TIMEOUT` bounds the wait for the head of the "
        "response",
    )
    max_size: int = _setting(
        0,
        number_of(int, 0, "bytes", zero="no limit"),
        _LIMITS,
        "replaces `DOWNLOAD_MAXSIZE` for streamed bodies, enforced while they arrive. "
        '`meta["download_maxsize"]` of a request takes precedence',
    )
    min_free_bytes: int = _setting(
        512 << 20,
        number_of(int, 0, "bytes", zero="no reserve"),
        _LIMITS,
        "bytes that stay free on the disks of the store and of the parts; the declared lengths of "
        "downloads in flight count as used. A file that does not fit waits (`no-space`)",
    )
    patience: float = _setting(
        300.0,
        number_of(float, 0, "seconds", zero="no waiting"),
        _LIMITS,
        "how long a file waits for space; then it fails, as do all others that do not fit, until there "
        "is space again. Parts are kept",
    )
    allow_private_addresses: bool = _setting(
        True,
        FLAG,
        _LIMITS,
        "off: a file is only fetched from a server whose address is of the public Internet, checked on "
        "the connection, at each redirect anew (`private-address`); through a proxy the proxy's address "
        "counts. A body that Scrapy buffers is refused after it arrived",
    )
    restarts: int = _setting(
        3,
        number_of(int, 0),
        _LIMITS,
        "refused answers to one request after which it fails",
    )
    revalidate: str = _setting(
        "expired",
        one_of("always", "expired", "never"),
        _JOBS,
        "when to ask the server whether a stored file changed; `expired`: when the file is older than "
        "`FILES_EXPIRES` days",
    )
    weak_validators: str = _setting(
        "accept",
        one_of("accept", "refetch"),
        _JOBS,
        "a 304 to a weak entity-tag means that the content is equivalent, not that its bytes are equal: "
        "`accept` it, or `refetch` such files instead of revalidating them",
    )
    unvalidated_resume: str = _setting(
        "never",
        one_of("never", "verify"),
        _JOBS,
        "`never`: a part without a strong validator is fetched again from its first byte. `verify`: "
        "where a digest of the whole is expected and the length is known, the part's last 64 KiB are "
        "asked for again with the rest and compared, and the digest decides",
    )
    lease_seconds: float = _setting(
        60.0,
        number_of(float, 1, "seconds"),
        _JOBS,
        "how long a worker keeps a job without renewing its lease; a lease is renewed every quarter of "
        "that time",
    )
    history_days: float = _setting(
        30.0,
        number_of(float, 0, "days", zero="no history"),
        _JOBS,
        "how long each change of a job's state is kept (`scrapy streaming show`)",
    )
    stop: str = _setting(
        "auto",
        one_of("auto", "finish", "checkpoint"),
        _JOBS,
        "what the first Ctrl-C does: `finish` the downloads in flight, `checkpoint` them and end in "
        "seconds, or (`auto`) choose by whether the next crawl requests the same pages again; see "
        "[stopping](stopping.md)",
    )
    held: str = _setting(
        "wait",
        one_of("wait", "skip"),
        _JOBS,
        "what to do when another worker has the job: `wait` for its result, or `skip` the file. A job of "
        "another crawl in the same process is always waited for",
    )
    max_attempts: int = _setting(
        5,
        number_of(int, 1),
        _JOBS,
        "claims of a job whose workers died, after which no worker is given it again",
    )
    work_id: str | None = _setting(
        None,
        STORABLE,
        _JOBS,
        "the work id in the job key; by default the spider's name. Two spiders with one work id share "
        "their jobs",
    )
    work_id_field: str | None = _setting(
        None,
        ITEM_FIELD,
        _JOBS,
        "an item field that has the work id",
    )
    failures_field: str | None = _setting(
        None,
        ITEM_FIELD,
        _FAILED,
        "an item field that lists the item's failed files, each with its `url`, [`reason`](failures.md), "
        "`status` (of the last answer, `None` if there was none), `attempts` (requests sent for it in "
        "this crawl, retries and redirects included) and `kept` (bytes of its part that the next crawl "
        "resumes from). It must not be the field of `FILES_RESULT_FIELD` or `FILES_URLS_FIELD`",
    )
    store: Path | None = None

    @classmethod
    def load(cls, settings: SettingsSource, environ: Mapping[str, str]) -> StreamingSettings:
        """Return the settings; raise ``SettingError`` for the first one that cannot be read.

        Precedence: ``-s`` on the command line, the environment, the project, the default.
        """
        values = {name: _read(name, settings, environ) for name in SETTINGS}
        _refuse_taken_field(values["STREAMING_FAILURES_FIELD"], settings)
        return cls(
            store=local_store(settings.get("FILES_STORE")),
            **{_field(name): value for name, value in values.items()},
        )

    @property
    def why_off(self) -> str | None:
        """Why nothing is streamed in this crawl, ``None`` if it is."""
        if not self.enabled:
            return "STREAMING_ENABLED is off"
        return "FILES_STORE names no local directory" if self.store is None else None

    @property
    def why_no_database(self) -> str | None:
        """Why no database can be opened, ``None`` if one can."""
        if not self.schema_enabled:
            return "STREAMING_SCHEMA_ENABLED is off"
        return None if find_spec("sqlalchemy") else "SQLAlchemy is not installed"

    @property
    def why_no_ledger(self) -> str | None:
        """Why jobs are not recorded, ``None`` if they are."""
        if self.why_no_database is None and not self.idempotency_enabled:
            return "STREAMING_IDEMPOTENCY_ENABLED is off"
        return self.why_no_database

    @property
    def directory(self) -> Path | None:
        """The directory of parts, quarantine and ledger, ``None`` without a store."""
        if self.dir is not None:
            return Path(self.dir).absolute()
        return None if self.store is None else self.store / ".streaming"


#: Every setting of the package, by the name users write.
SETTINGS: Final[Mapping[str, Setting]] = {
    f"STREAMING_{each.name.upper()}": each.metadata["setting"]
    for each in fields(StreamingSettings)
    if "setting" in each.metadata
}
#: Set by the add-on for the handler; not for users.
INTERNAL: Final = frozenset({"STREAMING_FALLBACK_DOWNLOAD_HANDLERS"})


def _field(name: str) -> str:
    return name.removeprefix("STREAMING_").lower()


def _read(name: str, settings: SettingsSource, environ: Mapping[str, str]) -> Any:
    setting = SETTINGS[name]
    value = settings.get(name)
    origin = name
    from_command_line = (settings.getpriority(name) or 0) >= CMDLINE_PRIORITY
    if f"SCRAPY_{name}" in environ and not from_command_line:
        value, origin = environ[f"SCRAPY_{name}"], f"SCRAPY_{name}"
    if value is None:
        return setting.default
    try:
        return setting.kind.read(value)
    except (ValueError, TypeError, OverflowError):
        msg = f"{origin}={value!r} cannot be read: allowed is {setting.kind.allowed}"
        raise SettingError(msg) from None


def _refuse_taken_field(name: str | None, settings: SettingsSource) -> None:
    """Raise ``SettingError`` if the field of failures has another use already."""
    for other, default in (("FILES_URLS_FIELD", "file_urls"), ("FILES_RESULT_FIELD", "files")):
        if name is not None and name == (settings.get(other) or default):
            msg = f"STREAMING_FAILURES_FIELD={name!r} is the field of {other}: name one of its own"
            raise SettingError(msg)


def local_store(uri: object) -> Path | None:
    """Return the directory that ``FILES_STORE`` names, ``None`` if it is empty or remote.

    It is the directory that Scrapy's ``FSFilesStore`` uses: the text behind ``file://`` is the path, and
    nothing in it is decoded.
    """
    if not uri:
        return None
    text = str(uri)
    try:
        remote = not Path(text).is_absolute() and urlsplit(text).scheme not in ("", "file")
    except ValueError as error:
        msg = f"FILES_STORE={text!r} cannot be read ({error}): allowed is a path or a URI"
        raise SettingError(msg) from error
    if remote:
        return None
    _, mark, path = text.partition("://")
    return Path(path if mark else text).absolute()


def unknown_settings(names: Iterable[object]) -> list[tuple[str, str | None]]:
    """Return each unknown ``STREAMING_*`` name with the nearest known one."""
    found = []
    for name in names:
        if isinstance(name, str) and name.startswith("STREAMING_") and name not in SETTINGS.keys() | INTERNAL:
            near = difflib.get_close_matches(name, SETTINGS, n=1)
            found.append((name, near[0] if near else None))
    return sorted(found)
