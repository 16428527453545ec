"""Keys, jobs and effects for code without a crawl, on both databases."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from adapter_kit import sha

import scrapy_streaming
from scrapy_streaming import integration
from scrapy_streaming.exceptions import JobUnavailable, LeaseLost, LedgerError, ResultTooLarge, SettingError
from scrapy_streaming.integration import FinalizedArtifact
from scrapy_streaming.protocol.jobs import Completion, Lease

ROOT = Path(scrapy_streaming.__file__).parents[1]
URL = "https://example.org/a.pdf"
KILLS = 2


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres_url"))
    return f"sqlite:///{tmp_path / 'ledger.sqlite3'}"


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (("W1", "A1", URL), "f8946140d22c8112de1cd51d3065fbea0b1d4d52b6592a3e0c42e73086dc9714"),
        (
            ("", "é", "https://example.org/%C3%A9?a=1&b=2"),
            "4cbdc7b431681fbf8202e9fba488178f650e7efedc7f04cba5af05eccf2ad14b",
        ),
    ],
)
def test_known_job_keys(arguments: tuple[str, str, str], key: str) -> None:
    assert integration.generate_job_key(*arguments) == key


def test_known_operation_keys() -> None:
    job = "0" * 64
    streamed = integration.generate_operation_key("STREAM", job, url=URL, range_start=1048576)
    assert streamed == "a427d1f7d90f2ea00051f53512e41ad4a44a59ec2103f582f269a31d52cabb5b"
    finalized = integration.generate_operation_key("FINALIZE", job)
    assert finalized == "2b8f14ab8a1993226959781d27f142794b35bf66f3741d1109837f435448fb55"


NO_TEXT: Any = None
NUMBER: Any = 1


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: integration.generate_job_key("w", "a", NO_TEXT), "url"),
        (lambda: integration.generate_job_key(NUMBER, "a", "u"), "work_id"),
        (lambda: integration.generate_operation_key("X", "j", v=2), "v"),
        (lambda: integration.generate_operation_key("X", "j", at=object()), "JSON|serializable"),
        (lambda: integration.generate_operation_key("X", "j", at=float("nan")), "key"),
    ],
)
def test_a_key_of_anything_else_is_refused(make: Any, named: str) -> None:
    with pytest.raises(TypeError, match=named):
        make()


def test_a_job_is_acquired_once_and_then_reused(url: str, tmp_path: Path) -> None:
    key = integration.generate_job_key("W1", "A1", URL)
    artifact = FinalizedArtifact(tmp_path / "a", f"sha256:{sha(b'a')}", 1, deduplicated=False)
    with integration.get_streaming_database(url) as db:
        lease = integration.acquire_or_reuse_job(db, key, "first")
        assert isinstance(lease, Lease)
        done = integration.complete_job(db, lease, artifact, url=URL)
        assert done is not None
        with pytest.raises(LeaseLost):
            integration.complete_job(db, Lease(lease.job_id, key, 0, "0" * 32, 0.0, 1), artifact)
    with integration.get_streaming_database(url) as db:
        again = integration.acquire_or_reuse_job(db, key, "second")
        assert isinstance(again, Completion)
        assert (again.completion_id, again.known.digest) == (done.completion_id, artifact.digest)
        job = db.job(key).result()
        assert (job.work_id, job.artifact_id, job.url) == ("W1", "A1", URL)
    health = integration.check_database_health(url)
    assert health is not None
    assert (health["status"], health["errors"]) == ("healthy", [])
    assert health["tables"]["ss_job"] == 1
    assert health["schema_version"] >= 3


def test_a_key_that_was_made_elsewhere_is_a_job_too(url: str) -> None:
    with integration.get_streaming_database(url) as db:
        assert isinstance(integration.acquire_or_reuse_job(db, "ab" * 32, "me"), Lease)
    assert (integration.check_database_health(url) or {})["errors"] == []


def test_another_workers_job_is_waited_for_or_said(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "cd" * 32
    got: list[Any] = []
    with integration.get_streaming_database(url) as other, integration.get_streaming_database(url) as db:
        assert isinstance(integration.acquire_or_reuse_job(other, key, "other"), Lease)
        waiting = threading.Thread(target=lambda: got.append(integration.acquire_or_reuse_job(db, key, "me")))
        waiting.start()
        monkeypatch.setenv("SCRAPY_STREAMING_HELD", "skip")
        with (
            integration.get_streaming_database(url) as hasty,
            pytest.raises(JobUnavailable, match="other") as refused,
        ):
            integration.acquire_or_reuse_job(hasty, key, "hasty")
        assert refused.value.reason == "held"
        assert got == []
        other.close()
        waiting.join(30)
        assert [type(each) for each in got] == [Lease]


def test_a_worker_that_comes_back_under_its_name_has_its_job_at_once(url: str) -> None:
    """Its lease had a minute to go."""
    key = "ef" * 32
    with integration.get_streaming_database(url) as dead, integration.get_streaming_database(url) as db:
        old = integration.acquire_or_reuse_job(dead, key, "me")
        new = integration.acquire_or_reuse_job(db, key, "me")
        assert isinstance(old, Lease)
        assert isinstance(new, Lease)
        assert new.fence > old.fence
        with pytest.raises(LeaseLost):
            integration.run_effect(dead, "12" * 32, lambda: 1, lease=old)


def test_a_lease_outlives_its_seconds_while_the_database_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.sqlite3'}"
    monkeypatch.setenv("SCRAPY_STREAMING_LEASE_SECONDS", "1")
    with integration.get_streaming_database(url) as db:
        lease = integration.acquire_or_reuse_job(db, "ab" * 32, "me")
        assert isinstance(lease, Lease)
        while (found := db.job("ab" * 32).result()).lease_until <= lease.until:
            threading.Event().wait(0.02)  # the heartbeat renews it every quarter of a second
        assert found.fence == lease.fence


# -- effects ---------------------------------------------------------------------------------


RESULTS = ["text", "ä\u2028\0\ud800", {"sent": [1, 2.5, None]}, None, 3, [], "x" * 9000]


def test_an_effect_is_run_once_and_replayed(url: str) -> None:
    ran: list[int] = []
    for _ in range(2):
        with integration.get_streaming_database(url) as db:
            for number, result in enumerate(RESULTS):
                key = integration.generate_operation_key("TEST", "0" * 64, number=number)
                got = integration.run_effect(db, key, lambda n=number: (ran.append(n), RESULTS[n])[1])
                assert got == result
                assert type(got) is type(result)
    assert ran == list(range(len(RESULTS)))
    assert (integration.check_database_health(url) or {})["errors"] == []


def test_a_failure_is_raised_and_never_replayed(url: str) -> None:
    with integration.get_streaming_database(url) as db:
        with pytest.raises(ZeroDivisionError):
            integration.run_effect(db, "56" * 32, lambda: 1 / 0)
        assert integration.run_effect(db, "56" * 32, lambda: "done") == "done"


def test_a_result_that_cannot_be_kept_is_refused(url: str) -> None:
    with integration.get_streaming_database(url) as db:
        for result, error in (
            ("x" * 20000, ResultTooLarge),
            (object(), TypeError),
            (float("nan"), TypeError),
        ):
            with pytest.raises(error):
                integration.run_effect(db, "78" * 32, lambda r=result: r)


def test_two_at_once_run_an_effect_once(url: str) -> None:
    ran: list[str] = []
    entered, leave = threading.Event(), threading.Event()

    def slow() -> str:
        ran.append("slow")
        entered.set()
        assert leave.wait(30)
        return "slow"

    got: list[Any] = []
    with integration.get_streaming_database(url) as one, integration.get_streaming_database(url) as two:
        first = threading.Thread(target=lambda: got.append(integration.run_effect(one, "9a" * 32, slow)))
        first.start()
        assert entered.wait(30)
        second = threading.Thread(
            target=lambda: got.append(integration.run_effect(two, "9a" * 32, lambda: ran.append("quick")))
        )
        second.start()
        leave.set()
        first.join(30)
        second.join(30)
    assert (got, ran) == (["slow", "slow"], ["slow"])


#: Each effect in a process of its own, forked before anything is opened.
EFFECT = """
import os, signal, sys
from pathlib import Path
from scrapy_streaming import integration as it
import psycopg, scrapy_streaming.integration.database
import sqlalchemy.dialects.postgresql, sqlalchemy.dialects.sqlite
url, world, *work = sys.argv[1:]
world = Path(world)
def effect(what, op):
    with world.open("a") as stream:
        stream.write(op + "\\n")
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"op": op, "text": "\\u00e4 \\u2028"}
def run(what, ops):
    with it.get_streaming_database(url) as db:
        for op in ops:
            job = it.acquire_or_reuse_job(db, it.generate_job_key("w", op, "https://example.org/"), "worker")
            print(repr(it.run_effect(db, op, lambda: effect(what, op), lease=job)), flush=True)
for each in work:
    what, *ops = each.split()
    print(what, flush=True)
    if (child := os.fork()) == 0:
        run(what, ops)
        os._exit(0)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def effects(url: str, world: Path, *work: str) -> list[str]:
    """Run effects; return what each process printed, from what it was told to do to how it ended."""
    command = [sys.executable, "-c", EFFECT, url, str(world), *work]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def killed_and_replayed(url: str, world: Path, kills: int) -> dict[str, int]:
    """Kill effects between the effect and its record, run them again, twice; count what was recorded."""
    ops = [f"{number:064x}" for number in range(kills)]
    every = " ".join(ops)
    said = effects(url, world, *(f"die {op}" for op in ops), f"live {every}", f"again {every}")
    assert said[: 2 * kills] == ["die", f"ended {-signal.SIGKILL}"] * kills
    live, again = said[2 * kills :][: kills + 2], said[2 * kills :][kills + 2 :]
    assert (live[0], again[0]) == ("live", "again")
    assert live[1:] == again[1:]  # equal to the byte
    assert live[-1] == "ended 0"
    assert len(set(live[1:-1])) == kills
    with integration.get_streaming_database(url) as db:
        recorded = []
        for op in ops:
            job = db.job(integration.generate_job_key("w", op, "https://example.org/")).result()
            recorded += [row.state for row in db.details(job.id).result().operations if row.op_key == op]
    happened = world.read_text().splitlines()
    most = max(map(happened.count, ops))
    return {"killed": kills, "recorded": recorded.count("ok"), "rows": len(recorded), "most": most}


@pytest.mark.proves("I8", "I9")
def test_an_effect_that_was_killed_is_recorded_once(url: str, tmp_path: Path) -> None:
    """S7, short: dead between effect and record; then run again, recorded, and replayed."""
    found = killed_and_replayed(url, tmp_path / "world", KILLS)
    assert found == {"killed": KILLS, "recorded": KILLS, "rows": KILLS, "most": 2}


@pytest.mark.soak
@pytest.mark.proves("I8", "I9")
def test_an_effect_that_was_killed_100_times(url: str, tmp_path: Path) -> None:
    """S7."""
    found = killed_and_replayed(url, tmp_path / "world", 100)
    print("S7", url.partition(":")[0], found)
    assert found == {"killed": 100, "recorded": 100, "rows": 100, "most": 2}


def test_what_did_happen_is_found_and_not_done_again(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.sqlite3'}"
    world = tmp_path / "world"
    op = "bc" * 32
    assert effects(url, world, f"die {op}")[-1] == f"ended {-signal.SIGKILL}"
    with integration.get_streaming_database(url) as db:
        job = integration.acquire_or_reuse_job(
            db, integration.generate_job_key("w", op, "https://example.org/"), "worker"
        )
        got = integration.run_effect(
            db, op, lambda: 1 / 0, lease=job, recover=lambda: world.read_text().strip()
        )
        assert got == op


# -- what goes wrong -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda db: integration.acquire_or_reuse_job(db, "short", "me"), "job_key"),
        (lambda db: integration.acquire_or_reuse_job(db, "0" * 64, 3), "worker_id"),
        (lambda db: integration.acquire_or_reuse_job("db", "0" * 64, "me"), "db"),
        (lambda db: integration.run_effect(db, "0" * 63 + "g", lambda: 1), "op_key"),
        (lambda db: integration.run_effect(db, "0" * 64, "fn"), "fn"),
        (lambda db: integration.run_effect(db, "0" * 64, lambda: 1, lease="mine"), "lease"),
        (lambda db: integration.run_effect(db, "0" * 64, lambda: 1, recover=3), "recover"),
        (lambda db: integration.complete_job(db, "mine", "artifact"), "lease"),
        (lambda db: integration.check_database_health(3), "url"),
    ],
)
def test_a_wrong_argument_is_named(tmp_path: Path, call: Any, named: str) -> None:
    with (
        integration.get_streaming_database(f"sqlite:///{tmp_path / 'db'}") as db,
        pytest.raises(TypeError, match=named),
    ):
        call(db)


def test_a_database_that_nobody_names_is_said() -> None:
    with (
        pytest.raises(SettingError, match="SCRAPY_STREAMING_DATABASE_URL"),
        integration.get_streaming_database(),
    ):
        pass
    with pytest.raises(TypeError, match="url"), integration.get_streaming_database(3):  # type: ignore[arg-type]
        pass


def test_the_environment_names_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRAPY_STREAMING_DATABASE_URL", f"sqlite:///{tmp_path / 'named'}")
    with integration.get_streaming_database() as db:
        assert db is not None
    assert (tmp_path / "named").exists()
    assert (integration.check_database_health() or {})["status"] == "healthy"


def test_health_of_what_is_no_ledger(tmp_path: Path) -> None:
    missing = integration.check_database_health(f"sqlite:///{tmp_path / 'missing'}")
    assert missing is not None
    assert (missing["status"], missing["schema_version"], missing["tables"]) == ("unhealthy", None, {})
    assert len(missing["errors"]) == 1
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "junk").write_bytes(b"junk" * 5000)
    junk = integration.check_database_health(f"sqlite:///{tmp_path / 'junk'}")
    assert junk is not None
    assert junk["status"] == "unhealthy"
    with (
        pytest.raises(LedgerError),
        integration.get_streaming_database(f"sqlite:///{tmp_path / 'junk'}"),
    ):
        pass


def test_health_changes_no_older_ledger(tmp_path: Path) -> None:
    path = tmp_path / "old"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript((ROOT / "tests" / "storage" / "fixtures" / "ledger-v1.sql").read_text())
        before = list(connection.iterdump())
    health = integration.check_database_health(f"sqlite:///{path}")
    assert health is not None
    assert (health["status"], health["schema_version"]) == ("degraded", 1)
    assert "migrate" in health["errors"][0]
    with closing(sqlite3.connect(path)) as connection:
        assert list(connection.iterdump()) == before


def test_health_says_what_somebody_should_look_at(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'db'}"
    with integration.get_streaming_database(url) as db:
        lease = integration.acquire_or_reuse_job(db, "ab" * 32, "me")
        artifact = FinalizedArtifact(tmp_path / "a", f"sha256:{sha(b'a')}", 1, deduplicated=False)
        integration.complete_job(db, lease, artifact)
        db.set_blob_state(artifact.digest, "missing", ["present"]).result()
    health = integration.check_database_health(url)
    assert health is not None
    assert health["status"] == "degraded"
    assert "missing" in health["errors"][0]
