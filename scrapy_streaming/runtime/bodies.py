"""What a stop and the room on the disk need of a body that is being received.

What may live here: that one protocol. ``body_writer`` has the bodies.
"""

from __future__ import annotations

from typing import Protocol


class Body(Protocol):
    """A body that is being received."""

    received: int

    @property
    def url(self) -> str:
        """The URL it comes from."""

    @property
    def left(self) -> int | None:
        """How many bytes are still to come, ``None`` where that is not known."""

    @property
    def concluded(self) -> bool:
        """Whether its part is closed."""

    def break_off(self, error: Exception) -> None:
        """Receive no more of it."""
