"""Places where a test can kill or stop the process; without the variable they do nothing.

``SCRAPY_STREAMING_FAILPOINTS=blob-linked=kill:2,commit=stop`` kills the process the second time it
reaches ``blob-linked`` and stops it the first time it reaches ``commit`` (modelled on FreeBSD's
``fail(9)``). The variable is read once, at import.

What may live here: the reading of that variable, and the call that other modules place.
"""

from __future__ import annotations

import os
import signal
from typing import Final

VARIABLE: Final = "SCRAPY_STREAMING_FAILPOINTS"

_SIGNALS: Final = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def parse(text: str) -> dict[str, tuple[signal.Signals, int]]:
    """Return, for each place, the signal and at which passage it is sent; raise ``ValueError``."""
    found = {}
    for entry in filter(None, text.split(",")):
        name, _, what = entry.partition("=")
        action, _, passage = what.partition(":")
        if action not in _SIGNALS:
            msg = f"{VARIABLE}: {entry!r} is not NAME=kill or NAME=stop, with :COUNT"
            raise ValueError(msg)
        found[name] = (_SIGNALS[action], int(passage or 1))
    return found


ACTIVE: Final = parse(os.environ.get(VARIABLE, ""))


def failpoint(name: str) -> None:
    """Send this process the signal that the environment sets for this place, if any."""
    if ACTIVE and name in ACTIVE:
        action, left = ACTIVE[name]
        ACTIVE[name] = (action, left - 1)
        if left == 1:
            os.kill(os.getpid(), action)
