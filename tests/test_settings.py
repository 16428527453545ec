"""Settings: every value is read or refused by name, and the order of precedence holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scrapy.pipelines.files import FSFilesStore
from scrapy.settings import Settings

from scrapy_streaming.exceptions import SettingError, StreamingError
from scrapy_streaming.setting_kinds import RateRule
from scrapy_streaming.settings import SETTINGS, StreamingSettings, local_store, unknown_settings

LINK_MODES = ("auto", "reflink", "hardlink", "symlink", "copy", "none")
NOTHING: dict[str, str] = {}


def load(values: dict[str, Any] | None = None, environ: dict[str, str] | None = None) -> StreamingSettings:
    return StreamingSettings.load(Settings(values or {}), environ or {})


def test_without_settings_the_defaults_of_the_documentation_hold() -> None:
    settings = load()
    assert settings == StreamingSettings(
        enabled=True,
        resume_enabled=True,
        io_enabled=True,
        finalization_enabled=True,
        idempotency_enabled=True,
        schema_enabled=True,
        database_url=None,
        link_mode="auto",
        fsync=True,
        checkpoint_bytes=16 << 20,
        checkpoint_seconds=5.0,
        buffer_bytes=8 << 20,
        stall_timeout=60.0,
        min_rate=0,
        max_rate=None,
        allow_private_addresses=True,
        max_size=0,
        min_free_bytes=512 << 20,
        patience=300.0,
        revalidate="expired",
        weak_validators="accept",
        unvalidated_resume="never",
        restarts=3,
        lease_seconds=60.0,
        stop="auto",
        held="wait",
        max_attempts=5,
        history_days=30.0,
        dir=None,
        failures_field=None,
        work_id=None,
        work_id_field=None,
        store=None,
    )
    assert settings.directory is None


def test_command_line_wins_over_environment_over_spider_over_project_over_default() -> None:
    name = "STREAMING_RESTARTS"
    settings = Settings()
    read = [StreamingSettings.load(settings, NOTHING).restarts]
    settings.set(name, 10, priority="project")
    read.append(StreamingSettings.load(settings, NOTHING).restarts)
    settings.set(name, 20, priority="spider")
    read.append(StreamingSettings.load(settings, NOTHING).restarts)
    environ = {f"SCRAPY_{name}": "30"}
    read.append(StreamingSettings.load(settings, environ).restarts)
    settings.set(name, "40", priority="cmdline")
    read.append(StreamingSettings.load(settings, environ).restarts)
    assert read == [3, 10, 20, 30, 40]


def test_the_add_on_comes_below_the_project() -> None:
    settings = Settings({"STREAMING_HELD": "skip"})
    settings.set("STREAMING_HELD", "wait", priority="addon")
    assert StreamingSettings.load(settings, NOTHING).held == "skip"


GOOD: dict[str, list[tuple[object, object]]] = {
    "STREAMING_ENABLED": [
        *((value, True) for value in (True, 1, "1", "True", "true", "YES", " on ")),
        *((value, False) for value in (False, 0, "0", "False", "no", "OFF", "")),
    ],
    "STREAMING_DATABASE_URL": [
        ("sqlite:///jobs.db", "sqlite:///jobs.db"),
        ("sqlite:////var/jobs.db", "sqlite:////var/jobs.db"),
        ("postgresql://me@h/d", "postgresql://me@h/d"),
        ("postgresql+psycopg://me:secret@h:5432/d?sslmode=require",) * 2,
        ("", None),
        (None, None),
    ],
    "STREAMING_LINK_MODE": [(mode.upper(), mode) for mode in LINK_MODES],
    "STREAMING_CHECKPOINT_BYTES": [(1, 1), ("1048576", 1 << 20), (2.0, 2)],
    "STREAMING_CHECKPOINT_SECONDS": [(0.1, 0.1), ("2.5", 2.5), (3, 3.0)],
    "STREAMING_BUFFER_BYTES": [(65536, 65536)],
    "STREAMING_MAX_RATE": [
        (None, None), ("", None), (5, (RateRule("", 0, 0, 5),)), ("5", (RateRule("", 0, 0, 5),)),
        (
            "2000, 22:00-06:30 0, Example.org 9:00-17:00 50, ::1 7",
            (
                RateRule("", 0, 0, 2000), RateRule("", 1320, 390, 0), RateRule("example.org", 540, 1020, 50),
                RateRule("::1", 0, 0, 7),
            ),
        ),
    ],
    "STREAMING_MAX_SIZE": [(0, 0), (str(1 << 62), 1 << 62)],
    "STREAMING_REVALIDATE": [("Always", "always"), ("never", "never")],
    "STREAMING_RESTARTS": [(0, 0)],
    "STREAMING_LEASE_SECONDS": [(1, 1.0)],
    "STREAMING_STOP": [(each, each) for each in ("auto", "finish", "checkpoint")],
    "STREAMING_HELD": [("skip", "skip")],
    "STREAMING_MAX_ATTEMPTS": [(1, 1)],
    "STREAMING_HISTORY_DAYS": [(0, 0.0), ("0.5", 0.5), (365, 365.0)],
    "STREAMING_DIR": [("state", "state"), ("", None)],
    "STREAMING_WORK_ID": [("w", "w")],
    "STREAMING_WORK_ID_FIELD": [("f", "f")],
}  # fmt: skip


def field(name: str) -> str:
    return name.removeprefix("STREAMING_").lower()


@pytest.mark.parametrize(
    ("name", "value", "read"), [(name, *pair) for name, pairs in GOOD.items() for pair in pairs]
)
def test_good_values_are_read(name: str, value: object, read: object) -> None:
    found = getattr(load({name: value}), field(name))
    assert found == read
    assert type(found) is type(read)
    if isinstance(value, str):
        assert getattr(load(environ={f"SCRAPY_{name}": value}), field(name)) == read


FLAG: list[object] = ["maybe", "2", 2, -1, None.__class__, [], "tru", b"1"]
NUMBER: list[object] = [
    "",
    "x",
    "1 MB",
    "-1",
    -1,
    "nan",
    "inf",
    float("inf"),
    float("nan"),
    True,
    [],
    {},
    b"x",
]
TEXT: list[object] = [5, True, [], b"x", Path("x")]
BAD: dict[str, list[object]] = {
    "STREAMING_ENABLED": FLAG,
    "STREAMING_RESUME_ENABLED": FLAG,
    "STREAMING_IO_ENABLED": FLAG,
    "STREAMING_FINALIZATION_ENABLED": FLAG,
    "STREAMING_IDEMPOTENCY_ENABLED": FLAG,
    "STREAMING_SCHEMA_ENABLED": FLAG,
    "STREAMING_FSYNC": FLAG,
    "STREAMING_ALLOW_PRIVATE_ADDRESSES": FLAG,
    "STREAMING_DATABASE_URL": [
        "jobs.db", "sqlite:", "sqlite://", "sqlite:///", "sqlite:///:memory:", "postgresql", "postgresql:",
        "postgresql+psycopg2://h/d", "postgres://h/d", "mysql://h/d", 5,
    ],
    "STREAMING_LINK_MODE": ["", "soft", "hard link", 5, ["auto"]],
    "STREAMING_CHECKPOINT_BYTES": [*NUMBER, 0, "0", 1.5, "1.5", "16e6"],
    "STREAMING_CHECKPOINT_SECONDS": [*NUMBER, 0, 0.05],
    "STREAMING_BUFFER_BYTES": [*NUMBER, 0, 65535],
    "STREAMING_STALL_TIMEOUT": [*NUMBER, 0],
    "STREAMING_MIN_RATE": [*NUMBER, -1, 1.5],
    "STREAMING_MAX_RATE": [
        -1, True, 1.5, "1.5", "fast", "1e6", "a b 5", "10:00 5", "25:00-26:00 5", "5,", "a/b 5", "-5", "7 5",
        [], {},
    ],
    "STREAMING_MAX_SIZE": [*NUMBER, 0.5],
    "STREAMING_MIN_FREE_BYTES": [*NUMBER, 1.5],
    "STREAMING_PATIENCE": NUMBER,
    "STREAMING_REVALIDATE": ["", "sometimes", True],
    "STREAMING_UNVALIDATED_RESUME": ["", "always", True],
    "STREAMING_WEAK_VALIDATORS": ["", "never", True],
    "STREAMING_RESTARTS": [*NUMBER, 2.5],
    "STREAMING_LEASE_SECONDS": [*NUMBER, 0, 0.99],
    "STREAMING_STOP": ["", "now", True],
    "STREAMING_HELD": ["", "drop"],
    "STREAMING_MAX_ATTEMPTS": [*NUMBER, 0],
    "STREAMING_HISTORY_DAYS": NUMBER,
    "STREAMING_DIR": TEXT,
    "STREAMING_FAILURES_FIELD": TEXT,
    "STREAMING_WORK_ID": TEXT,
    "STREAMING_WORK_ID_FIELD": TEXT,
}  # fmt: skip


def test_every_setting_has_bad_values_here() -> None:
    assert BAD.keys() == SETTINGS.keys()


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_bad_values_are_refused_with_name_value_and_what_is_allowed(name: str, value: object) -> None:
    with pytest.raises(SettingError) as caught:
        load({name: value})
    text = str(caught.value)
    assert text.startswith(f"{name}={value!r} ")
    assert text.endswith(SETTINGS[name].kind.allowed)
    assert caught.value.reason == "unreadable-setting"
    assert isinstance(caught.value, StreamingError | ValueError)
    assert "\n" not in text


@pytest.mark.parametrize("url", ["mysql://me:s3cret@h/d", "postgres://me:s3cret@h/d", "x://s3cret@h"])
def test_a_password_in_a_bad_value_is_not_shown(url: str) -> None:
    with pytest.raises(SettingError, match="STREAMING_DATABASE_URL") as caught:
        load({"STREAMING_DATABASE_URL": url})
    assert "s3cret" not in str(caught.value)
    assert "@h" in str(caught.value)


@pytest.mark.parametrize(
    "values", [{}, {"FILES_RESULT_FIELD": "own", "FILES_URLS_FIELD": "mine"}], ids=["default", "named"]
)
def test_failures_are_not_listed_in_a_field_of_another_use(values: dict[str, Any]) -> None:
    for name, field in (("FILES_RESULT_FIELD", "files"), ("FILES_URLS_FIELD", "file_urls")):
        taken = values.get(name, field)
        with pytest.raises(SettingError, match=rf"^STREAMING_FAILURES_FIELD='{taken}' .*{name}"):
            load(values | {"STREAMING_FAILURES_FIELD": taken})
        assert load(values | {"STREAMING_FAILURES_FIELD": f"{taken}_failed"}).failures_field


def test_a_bad_value_from_the_environment_names_the_variable() -> None:
    with pytest.raises(SettingError, match=r"^SCRAPY_STREAMING_HELD='drop' .* wait or skip$"):
        load({"STREAMING_HELD": "skip"}, {"SCRAPY_STREAMING_HELD": "drop"})


def test_a_bad_value_of_lower_precedence_is_ignored() -> None:
    environ = {"SCRAPY_STREAMING_HELD": "skip"}
    assert load({"STREAMING_HELD": "drop"}, environ).held == "skip"
    settings = Settings()
    settings.set("STREAMING_HELD", "wait", priority="cmdline")
    assert StreamingSettings.load(settings, {"SCRAPY_STREAMING_HELD": "drop"}).held == "wait"


def test_only_names_with_the_prefix_count_in_the_environment() -> None:
    assert load(environ={"STREAMING_RESTARTS": "9", "scrapy_STREAMING_RESTARTS": "9"}).restarts == 3


# -- where files go --------------------------------------------------------------------------


@pytest.mark.parametrize("uri", ["downloads", "down loads/b", "./x", "../x", "a%20b", "~", "a:b/c"])
def test_a_relative_store_is_below_the_working_directory(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = None if uri == "a:b/c" else tmp_path / uri  # that one has a scheme
    assert local_store(uri) == expected


@pytest.mark.parametrize("uri", ["", None, "s3://bucket/x", "gs://bucket", "ftp://u:p@host/x", "S3://b"])
def test_no_store_and_remote_stores_are_not_local(uri: object) -> None:
    assert local_store(uri) is None


def test_an_absolute_store_is_itself(tmp_path: Path) -> None:
    assert local_store(str(tmp_path)) == tmp_path
    assert local_store(tmp_path) == tmp_path
    assert load({"FILES_STORE": str(tmp_path)}).store == tmp_path
    assert load({"FILES_STORE": str(tmp_path)}).directory == tmp_path / ".streaming"


@pytest.mark.parametrize(
    "uri",
    [
        "{0}/x",
        "file://{0}/x",
        "FILE://{0}/x",
        "file://{0}/a%20b",
        "file://{0}/a b?c#d",
        "file://rel/x",
        "rel",
        "{0}/a://b",
    ],
)
def test_files_go_where_scrapys_own_store_would_put_them(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arriving and leaving are safe only if both mean the same directory."""
    monkeypatch.chdir(tmp_path)
    uri = uri.format(tmp_path)
    assert local_store(uri) == Path(FSFilesStore(uri).basedir).absolute()


def test_a_store_that_is_no_uri_is_refused_by_name() -> None:
    with pytest.raises(SettingError, match=r"^FILES_STORE='http://\[' "):
        load({"FILES_STORE": "http://["})


def test_the_state_directory_may_be_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load({"STREAMING_DIR": "state", "FILES_STORE": "x"}).directory == tmp_path / "state"
    assert load({"STREAMING_DIR": "state", "FILES_STORE": "s3://b"}).directory == tmp_path / "state"
    assert load({"FILES_STORE": "s3://b"}).directory is None


# -- names that are none ---------------------------------------------------------------------


def test_unknown_names_come_with_the_nearest_known_one() -> None:
    names = [
        "STREAMING_LINKMODE", "STREAMING_FSYNCS", "STREAMING_QQQQQQQQ", "FILES_STORE", "streaming_link_mode",
        5, None, "STREAMING_ENABLED", "STREAMING_FALLBACK_DOWNLOAD_HANDLERS", ("STREAMING_X",),
    ]  # fmt: skip
    found = unknown_settings(names)
    assert ("STREAMING_LINKMODE", "STREAMING_LINK_MODE") in found
    assert ("STREAMING_FSYNCS", "STREAMING_FSYNC") in found
    assert [name for name, _ in found] == ["STREAMING_FSYNCS", "STREAMING_LINKMODE", "STREAMING_QQQQQQQQ"]


def test_scrapys_own_settings_are_not_unknown() -> None:
    assert unknown_settings(Settings({name: setting.default for name, setting in SETTINGS.items()})) == []
