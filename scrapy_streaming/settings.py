"""The settings, read once into one frozen value.

What may live here: names, defaults, how a text becomes a value, and the order of precedence.
Every setting may also come from the environment as ``SCRAPY_<NAME>``.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

from scrapy_streaming.exceptions import SettingError

#: Scrapy's priority of ``-s NAME=VALUE``; what stands there wins over the environment.
CMDLINE_PRIORITY: Final = 40

_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"0", "false", "no", "off", ""})


class SettingsSource(Protocol):
    """What is needed of Scrapy's ``BaseSettings``."""

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value, or *default*."""

    def getpriority(self, name: str) -> int | None:
        """Return the priority it was set with."""

    def __iter__(self) -> Any:
        """Iterate over the names."""


def _flag(value: object) -> bool:
    text = str(value).strip().lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError


def _at_least(minimum: float, kind: Callable[[Any], float]) -> Callable[[object], float]:
    def read(value: object) -> float:
        number = kind(value)
        if isinstance(value, bool) or not math.isfinite(number) or number < minimum:
            raise ValueError
        if isinstance(value, float) and number != value:  # half a byte, half a restart
            raise ValueError
        return number

    return read


def _one_of(*allowed: str) -> Callable[[object], str]:
    def read(value: object) -> str:
        text = str(value).strip().lower()
        if text not in allowed:
            raise ValueError
        return text

    return read


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    raise ValueError


def _optional_text(value: object) -> str | None:
    return None if value is None or value == "" else _text(value)


def _storable_text(value: object) -> str | None:
    text = _optional_text(value)
    if text is not None and "\0" in text:
        raise ValueError
    return None if text is None else text.encode("utf-8").decode("utf-8")


@dataclass(frozen=True, slots=True)
class RateRule:
    """*rate* bytes a second (0: no limit) for a host, ``""`` for all, from *start* to *end*.

    Those are minutes of the local day; an end before the start is on the next day, an equal one
    is a whole day later.
    """

    host: str
    start: int
    end: int
    rate: int

    def holds(self, minute: int) -> bool:
        """Whether it holds at a minute of the day."""
        if self.start < self.end:
            return self.start <= minute < self.end
        return minute >= self.start or minute < self.end


_HOST = re.compile(r"[A-Za-z0-9._-]*[A-Za-z.][A-Za-z0-9._-]*|[0-9A-Fa-f]*(:[0-9A-Fa-f.]*){2,}", re.ASCII)
_TIME = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)-([01]?\d|2[0-3]):([0-5]\d)", re.ASCII)


def _rate_rules(value: object) -> tuple[RateRule, ...] | None:
    """Return the rules of a text ``[HOST] [HH:MM-HH:MM] BYTES, …``, or of a number of bytes."""
    if value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError
    return tuple(_rate_rule(each.strip()) for each in str(value).split(","))


def _rate_rule(text: str) -> RateRule:
    *words, rate = text.split()
    host, start, end = "", 0, 0
    if words and (found := _TIME.fullmatch(words[-1])) is not None:
        start, end = int(found[1]) * 60 + int(found[2]), int(found[3]) * 60 + int(found[4])
        words.pop()
    if words:
        [host] = words
        if not _HOST.fullmatch(host):
            raise ValueError
    if not rate.isascii() or not rate.isdigit():
        raise ValueError
    return RateRule(host.lower(), start, end, int(rate))


def _database_url(value: object) -> str | None:
    text = _optional_text(value)
    if text is None or text.startswith(("postgresql://", "postgresql+psycopg://")):
        return text
    if text.removeprefix("sqlite:///") in (text, "", ":memory:"):
        raise ValueError
    return text


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: its default, how its value is read, and what is allowed, in words."""

    default: object
    read: Callable[[Any], Any]
    allowed: str


_BYTES = "a whole number of bytes"
_FLAG = "True or False (1, 0, yes, no, on, off)"

#: Every setting of the package, by the name users write.
SETTINGS: Final[Mapping[str, Setting]] = {
    "STREAMING_ENABLED": Setting(True, _flag, _FLAG),
    "STREAMING_RESUME_ENABLED": Setting(True, _flag, _FLAG),
    "STREAMING_IO_ENABLED": Setting(True, _flag, _FLAG),
    "STREAMING_FINALIZATION_ENABLED": Setting(True, _flag, _FLAG),
    "STREAMING_IDEMPOTENCY_ENABLED": Setting(True, _flag, _FLAG),
    "STREAMING_SCHEMA_ENABLED": Setting(True, _flag, _FLAG),
    "STREAMING_DATABASE_URL": Setting(
        None, _database_url, "sqlite:///PATH or postgresql+psycopg://HOST/DATABASE"
    ),
    "STREAMING_LINK_MODE": Setting(
        "auto",
        _one_of("auto", "reflink", "hardlink", "symlink", "copy", "none"),
        "one of auto, reflink, hardlink, symlink, copy, none",
    ),
    "STREAMING_FSYNC": Setting(True, _flag, _FLAG),
    "STREAMING_CHECKPOINT_BYTES": Setting(16 << 20, _at_least(1, int), f"{_BYTES}, 1 or more"),
    "STREAMING_CHECKPOINT_SECONDS": Setting(5.0, _at_least(0.1, float), "seconds, 0.1 or more"),
    "STREAMING_BUFFER_BYTES": Setting(8 << 20, _at_least(1 << 16, int), f"{_BYTES}, 65536 or more"),
    "STREAMING_STALL_TIMEOUT": Setting(60.0, _at_least(0.1, float), "seconds, 0.1 or more"),
    "STREAMING_MIN_RATE": Setting(0, _at_least(0, int), "a whole number of bytes a second, 0 for none"),
    "STREAMING_MAX_RATE": Setting(
        None, _rate_rules, "bytes a second, or rules [HOST] [HH:MM-HH:MM] BYTES with commas between them"
    ),
    "STREAMING_MAX_SIZE": Setting(0, _at_least(0, int), f"{_BYTES}, 0 for no limit"),
    "STREAMING_MIN_FREE_BYTES": Setting(512 << 20, _at_least(0, int), f"{_BYTES}, 0 for no reserve"),
    "STREAMING_PATIENCE": Setting(300.0, _at_least(0, float), "seconds, 0 for no waiting"),
    "STREAMING_REVALIDATE": Setting(
        "expired", _one_of("always", "expired", "never"), "one of always, expired, never"
    ),
    "STREAMING_WEAK_VALIDATORS": Setting("accept", _one_of("accept", "refetch"), "accept or refetch"),
    "STREAMING_UNVALIDATED_RESUME": Setting("never", _one_of("never", "verify"), "never or verify"),
    "STREAMING_ALLOW_PRIVATE_ADDRESSES": Setting(True, _flag, _FLAG),
    "STREAMING_RESTARTS": Setting(3, _at_least(0, int), "a whole number, 0 or more"),
    "STREAMING_LEASE_SECONDS": Setting(60.0, _at_least(1, float), "seconds, 1 or more"),
    "STREAMING_STOP": Setting(
        "auto", _one_of("auto", "finish", "checkpoint"), "one of auto, finish, checkpoint"
    ),
    "STREAMING_HELD": Setting("wait", _one_of("wait", "skip"), "wait or skip"),
    "STREAMING_MAX_ATTEMPTS": Setting(5, _at_least(1, int), "a whole number, 1 or more"),
    "STREAMING_HISTORY_DAYS": Setting(30.0, _at_least(0, float), "days, 0 for no history"),
    "STREAMING_DIR": Setting(None, _optional_text, "a path"),
    "STREAMING_FAILURES_FIELD": Setting(None, _optional_text, "the name of an item field"),
    "STREAMING_WORK_ID": Setting(None, _storable_text, "a text without NUL and lone surrogates"),
    "STREAMING_WORK_ID_FIELD": Setting(None, _optional_text, "the name of an item field"),
}

#: Set by the add-on for the handler; not for users.
INTERNAL: Final = frozenset({"STREAMING_FALLBACK_DOWNLOAD_HANDLERS"})


@dataclass(frozen=True, slots=True)
class StreamingSettings:
    """All settings of one crawl. Times in seconds, sizes in bytes.

    ``store`` is the local directory that ``FILES_STORE`` names, ``None`` when there is none or
    it is not a local one.
    """

    enabled: bool
    resume_enabled: bool
    io_enabled: bool
    finalization_enabled: bool
    idempotency_enabled: bool
    schema_enabled: bool
    database_url: str | None
    link_mode: str
    fsync: bool
    checkpoint_bytes: int
    checkpoint_seconds: float
    buffer_bytes: int
    stall_timeout: float
    min_rate: int
    max_rate: tuple[RateRule, ...] | None
    max_size: int
    min_free_bytes: int
    patience: float
    revalidate: str
    weak_validators: str
    unvalidated_resume: str
    allow_private_addresses: bool
    restarts: int
    lease_seconds: float
    stop: str
    held: str
    max_attempts: int
    history_days: float
    dir: str | None
    failures_field: str | None
    work_id: str | None
    work_id_field: str | None
    store: Path | None

    @classmethod
    def load(cls, settings: SettingsSource, environ: Mapping[str, str]) -> StreamingSettings:
        """Return the settings; raise ``SettingError`` for the first that cannot be read.

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
        """Why nothing is recorded of jobs, ``None`` if it is."""
        if self.why_no_database is None and not self.idempotency_enabled:
            return "STREAMING_IDEMPOTENCY_ENABLED is off"
        return self.why_no_database

    @property
    def directory(self) -> Path | None:
        """Where parts and the ledger live."""
        if self.dir is not None:
            return Path(self.dir).absolute()
        return None if self.store is None else self.store / ".streaming"


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
        return setting.read(value)
    except (ValueError, TypeError, OverflowError):
        msg = f"{origin}={value!r} cannot be read: allowed is {setting.allowed}"
        raise SettingError(msg) from None


def _refuse_taken_field(field: str | None, settings: SettingsSource) -> None:
    """Raise ``SettingError`` for a field of failures that has another use already."""
    for name, default in (("FILES_URLS_FIELD", "file_urls"), ("FILES_RESULT_FIELD", "files")):
        if field is not None and field == (settings.get(name) or default):
            msg = f"STREAMING_FAILURES_FIELD={field!r} is the field of {name}: name one of its own"
            raise SettingError(msg)


def local_store(uri: object) -> Path | None:
    """Return the directory that ``FILES_STORE`` names, ``None`` if it is empty or remote.

    The same that Scrapy's ``FSFilesStore`` takes: behind ``file://`` stands the path as it is,
    with nothing decoded.
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


_missing = {_field(name) for name in SETTINGS} ^ ({f.name for f in fields(StreamingSettings)} - {"store"})
if _missing:  # pragma: no cover - a mistake in this file, found at import
    raise AssertionError(_missing)
