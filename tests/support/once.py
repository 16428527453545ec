"""What several workers of one test run share: made by the first that asks for it, read by the others.

What may live here: sharing between the processes of one run of the tests.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], T]) -> T:
    """Return what *make* makes, which can be pickled; it is called with a folder, by one worker only.

    The others wait, and read what was made (pytest-xdist, "Making session-scoped fixtures execute only
    once"). What fails is tried again by the next.
    """
    own = factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    made = shared / f"{name}.pickle"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            value = pickle.dumps(make(Path(tempfile.mkdtemp(prefix=f"{name}-", dir=shared))))
            made.with_suffix(".tmp").write_bytes(value)
            made.with_suffix(".tmp").replace(made)
        found: T = pickle.loads(made.read_bytes())
    return found
