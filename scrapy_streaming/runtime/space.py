"""How much room there is on the disks, beside the reserve and the bodies in flight (R9, C21).

What may live here: measuring. Waiting for room is ``room``. Knows no event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from scrapy_streaming.exceptions import StreamingError, WriteFailed
from scrapy_streaming.runtime.bodies import Body
from scrapy_streaming.storage.filesystems import free_bytes

#: Seconds before the disk is measured again; twice as long each time, up to the second number.
FIRST_PAUSE: Final = 1.0
LONGEST_PAUSE: Final = 15.0
#: What a file of unknown length needs at least before it is worth while to try again.
UNKNOWN_NEED: Final = 1 << 20


class NoSpace(WriteFailed):
    """A body does not fit on the disk beside the reserve and those in flight. ``need`` is in bytes."""

    reason = "no-space"

    def __init__(self, message: str, need: int) -> None:
        super().__init__(message)
        self.need = need


class Space:
    """Measures whether more fits: *reserve* bytes stay free on each filesystem of *folders*.

    ``exhausted``: something waited for room as long as it may, and nothing has found any since.
    """

    def __init__(
        self, folders: Iterable[Path], reserve: int, free_in: Callable[[Path], int] | None = None
    ) -> None:
        self.reserve = reserve
        self.exhausted = False
        self._free_in = free_in or free_bytes
        self._folders = tuple(folders)

    def free(self, coming: Iterable[Body] = ()) -> int:
        """Return how many bytes may be written beside the reserve and what is *coming*; below 0 for none."""
        promised = sum(body.left or 0 for body in coming)
        return min(self._free_in(folder) for folder in self._folders) - self.reserve - promised

    def refusal(self, url: str, need: int | None, coming: Iterable[Body]) -> NoSpace | None:
        """Return why a body of *need* bytes (``None``: unknown) does not fit, ``None`` if it does."""
        free = self.free(coming)
        if free >= (need or 0):
            return None
        size = "a body of unknown length does" if need is None else f"{need} bytes do"
        msg = (
            f"{url}: {size} not fit: {max(0, free)} bytes are free beside STREAMING_MIN_FREE_BYTES="
            f"{self.reserve} and what is in flight"
        )
        return NoSpace(msg, need or UNKNOWN_NEED)


def pause(tried: int) -> float:
    """Return how many seconds to wait before a disk is measured again that was full *tried* times."""
    return min(FIRST_PAUSE * 2.0 ** min(tried, 10), LONGEST_PAUSE)


def is_no_space(error: BaseException) -> bool:
    """Whether an error means that the disk is full."""
    return isinstance(error, StreamingError) and error.reason == NoSpace.reason
