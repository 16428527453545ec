"""Many worker processes over one ledger and one store, and the faults that strike them.

What may live here: starting, stopping, killing and waiting for the processes of ``support.worker``, at
random or one by one. ``python -m support.workers chaos --help`` (with ``tests`` on PYTHONPATH) is the long
form by hand: it kills and stops workers at random and prints the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from support.launch import Forked, launch
from support.ledger_checker import bound, violations
from support.worker import Plan, truth

TESTS = Path(__file__).parent.parent


@dataclass
class Process:
    """A worker process: its plan, and what it wrote to its standard error."""

    plan: Plan
    popen: Forked
    stderr: Path
    stopped: bool = False
    killed: bool = False

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def kill(self) -> None:
        self.killed = True
        self.popen.kill()
        self.popen.wait()

    def stop(self) -> None:
        self.stopped = True
        self.popen.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.stopped = False
        if self.alive:
            self.popen.send_signal(signal.SIGCONT)

    def wait(self, seconds: float) -> int:
        """Return its exit code; raise ``TimeoutError`` if it does not end."""
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired as error:
            msg = f"{self.plan.name} did not end in {seconds} s: {self.stderr.read_text()[-3000:]}"
            raise TimeoutError(msg) from error


@dataclass
class Workers:
    """Worker processes that share a ledger, a store and a log below *plan.folder*; a context."""

    plan: Plan
    all: list[Process] = field(default_factory=list)
    _lines: list[dict[str, Any]] = field(default_factory=list)
    _offset: int = 0

    def __post_init__(self) -> None:
        for name in ("parts", "quarantine"):
            (self.plan.root / ".streaming" / name).mkdir(parents=True, exist_ok=True)
        self.set_version(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.all:
            if process.alive:
                process.kill()

    def set_version(self, version: int) -> None:
        """Change the bytes of every key: what is claimed from now on has the new ones."""
        self.version = version
        path = Path(self.plan.folder) / "version"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(str(version))
        temporary.rename(path)

    def start(self, count: int = 1, *, mode: str = "work", **changes: Any) -> list[Process]:
        """Start workers whose plan is the common one but for *changes*; return them."""
        return [self._start_one(mode, changes) for _ in range(count)]

    def _start_one(self, mode: str, changes: dict[str, Any]) -> Process:
        plan = replace(self.plan, name=f"worker-{len(self.all)}", **changes)
        stderr = Path(self.plan.folder) / f"{plan.name}.stderr"
        popen = launch(
            "support.worker", [mode, json.dumps(asdict(plan))],
            env={**os.environ, "PYTHONPATH": str(TESTS)}, cwd=Path(self.plan.folder), output=stderr,
        )  # fmt: skip
        process = Process(plan, popen, stderr)
        self.all.append(process)
        return process

    @property
    def running(self) -> list[Process]:
        return [process for process in self.all if process.alive and not process.stopped]

    def lines(self, *what: str) -> list[dict[str, Any]]:
        """Return the lines of the workers' log, all of them or those of these kinds."""
        if self.plan.log.exists():
            with self.plan.log.open("rb") as stream:
                stream.seek(self._offset)
                text = stream.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._offset += len(whole)
            self._lines += [json.loads(line) for line in whole.splitlines()]
        return [line for line in self._lines if not what or line["what"] in what]

    def until(self, true: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until something is true; raise ``TimeoutError`` if that takes too long."""
        deadline = time.monotonic() + seconds
        while not true():
            self.check_ends()
            if time.monotonic() > deadline:
                msg = f"not within {seconds} s; {self.figures()}; {self.error_tails()}"
                raise TimeoutError(msg)
            time.sleep(0.01)

    def done(self) -> int:
        return len({line["number"] for line in self.lines("done")})

    def wait(self, seconds: float = 90) -> None:
        """Wait until all have ended by themselves; raise if one failed."""
        deadline = time.monotonic() + seconds
        for process in self.all:
            process.wait(max(0.1, deadline - time.monotonic()))
        self.check_ends()

    def check_ends(self) -> None:
        """Raise ``AssertionError`` if a worker failed that was not killed."""
        for process in self.all:
            code = process.popen.poll()
            fine = code in (None, 0) or (process.killed and code == -signal.SIGKILL)
            assert fine or process.plan.poison or process.plan.kill_in_migration, (
                f"{process.plan.name} ended with {code}: {process.stderr.read_text()[-3000:]}"
            )

    def error_tails(self) -> str:
        return "\n".join(text for p in self.all if (text := p.stderr.read_text()[-500:]))

    def figures(self) -> str:
        count = Counter(line["what"] for line in self.lines())
        return ", ".join(f"{number} {what}" for what, number in sorted(count.items()))

    def violations(self, **how: Any) -> list[str]:
        """Return what the ledger, the store and the log say that breaks an invariant; see ``violations``."""
        how = {"url": self.plan.url, "truth": truth(self.version), "log": self.lines()} | how
        return violations(root=self.plan.root, **how)


@dataclass
class Chaos:
    """Kills and stops workers at random, and starts others for the killed, until all have ended."""

    workers: Workers
    count: int
    faults: int
    share_of_stops: float = 0.5
    kills: int = 0
    stops: int = 0
    rng: random.Random = field(default_factory=random.Random)
    _suspended: list[tuple[float, Process]] = field(default_factory=list)

    def run(self, seconds: float = 120) -> None:
        """Inject at most *faults* kills and stops; raise ``TimeoutError`` if the rest takes too long.

        Called again after that, it continues with the workers there are.
        """
        workers, deadline = self.workers, time.monotonic() + seconds
        if not workers.all:
            workers.start(self.count)
        while any(process.alive for process in workers.all):
            time.sleep(self.rng.uniform(0.02, 0.25))
            self._resume_due()
            workers.check_ends()
            if self.rng.random() < 0.3:
                workers.set_version(workers.version + 1)
            if self.kills + self.stops < self.faults:
                self._inject_fault()
            if time.monotonic() > deadline:
                msg = f"not done after {seconds} s: {workers.figures()}; {workers.error_tails()}"
                raise TimeoutError(msg)
        workers.check_ends()

    def _resume_due(self) -> None:
        for resume_at, process in list(self._suspended):
            if time.monotonic() >= resume_at:
                process.resume()
                self._suspended.remove((resume_at, process))

    def _inject_fault(self) -> None:
        """Kill or stop a worker that has claimed something: so no series of faults stops all progress."""
        holding = {line["worker"] for line in self.workers.lines("granted")}
        candidates = [process for process in self.workers.running if process.plan.name in holding]
        if not candidates:
            return
        victim = self.rng.choice(candidates)
        if len(self._suspended) >= self.count - 1:
            return
        if self.rng.random() >= self.share_of_stops:
            victim.kill()
            self.kills += 1
            # the replacement presumes one worker dead: the killed one, a living one, or none
            gone = self.rng.choice([(victim.plan.name,), (self.rng.choice(candidates).plan.name,), ()])
            self.workers.start(presumed_dead=gone)
        else:
            victim.stop()
            self.stops += 1
            lease = victim.plan.lease
            self._suspended.append((time.monotonic() + self.rng.uniform(1.1, 2.5) * lease, victim))


# -- by hand ---------------------------------------------------------------------------------


def chaos(arguments: argparse.Namespace) -> int:
    """Run F2 and print its figures; the exit code says whether there were violations."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = f"sqlite:///{folder / 'ledger.sqlite3'}"
        if arguments.database == "postgres":
            from support.postgres import postgres

            url = stack.enter_context(postgres(folder)).create()
        plan = Plan(url, str(folder), keys=arguments.jobs, mutant=arguments.mutant)
        workers = stack.enter_context(Workers(plan))
        run = Chaos(workers, arguments.workers, arguments.faults, rng=random.Random(arguments.seed))
        began = time.monotonic()
        run.run(arguments.seconds)
        wrong = workers.violations()
        print(report(run, wrong), f"; {time.monotonic() - began:.0f} s", sep="")
        print(*wrong[:20], sep="\n")
        return 1 if wrong else 0


def report(run: Chaos, wrong: list[str]) -> str:
    """Return the figures of a run."""
    granted = len(run.workers.lines("granted"))
    found = f"{len(wrong)} violations" if wrong else f"0 violations ({bound(granted)} of a claim)"
    return f"{run.kills} kills, {run.stops} stops; {run.workers.figures()}; {found}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m support.workers")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("chaos", help="workers that are killed and stopped at random (F2)")
    command.add_argument("--database", choices=["sqlite", "postgres"], default="sqlite")
    command.add_argument("--workers", type=int, default=8)
    command.add_argument("--jobs", type=int, default=600)
    command.add_argument("--faults", type=int, default=200, help="kills and stops at most")
    command.add_argument("--seconds", type=float, default=600)
    command.add_argument("--seed", type=int)
    command.add_argument("--mutant", default="", help="guard, claim-id or one of support.mutants")
    command.set_defaults(run=chaos)
    found = parser.parse_args(arguments)
    return int(found.run(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
