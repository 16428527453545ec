"""The errors of the package: one tree, split by what the caller does next.

What may live here: error classes, each with its stable ``reason``. The statistic, the log line and the tests
use the same word.
"""

from __future__ import annotations

from scrapy_streaming.reasons import REASONS
from scrapy_streaming.redaction import without_credentials


class StreamingError(Exception):
    """The root; ``reason`` is the stable word for what happened. No message contains credentials (E7)."""

    reason = "streaming-error"

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        super().__init__(without_credentials(message))
        if reason is not None:
            self.reason = reason

    def __str__(self) -> str:
        """Return the message, with the reason unless it contains that already."""
        message = super().__str__()
        return message if self.reason in message else f"{message} ({self.reason})"


# -- the user has to change something; nothing is retried -------------------------------


class SettingError(StreamingError, ValueError):
    """A setting cannot be read; the message names it, its value and what is allowed."""

    reason = "unreadable-setting"

    def __str__(self) -> str:
        """Return the message alone: it is the one line that a user gets."""
        return str(self.args[0])


class StoreError(StreamingError):
    """The store cannot be used as it is; the message has the cause and the remedy.

    Reasons: ``store-not-writable``, ``store-format``, ``store-unsafe``, ``store-missing``,
    ``store-busy``, ``maintenance-runs``.
    """

    reason = "store-unusable"


class NotAdopted(StoreError):
    """A file in the store is not taken over; nothing was changed.

    Reasons: ``not-found``, ``not-regular`` (a link, a pipe, a directory), ``other-owner``, ``unreadable``,
    ``being-written``, ``checksum-mismatch``, ``interrupted``, ``blob-going`` (``gc`` is removing it);
    for a name that is detached: ``unreadable``, ``bad-blob``, ``blob-missing``, ``no-name`` (link mode none).
    """

    reason = "not-adopted"

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path!r} is {_NOT_ADOPTED[reason]}", reason=reason)
        self.path = path


_NOT_ADOPTED = {
    "not-found": "not there, or behind a link",
    "not-regular": "no plain file",
    "other-owner": "neither this user's, nor root's, nor that of the store's owner",
    "unreadable": "not readable",
    "being-written": "just being written",
    "checksum-mismatch": "of another checksum",
    "blob-going": "of bytes that gc is just removing",
    "interrupted": "not read to its end",
    "bad-blob": "of a blob whose bytes are not the right ones",
    "blob-missing": "of a blob that is not there",
    "no-name": "the path of a blob, and no name",
}


class LedgerError(StreamingError):
    """The ledger cannot be used; the message names the remedy.

    Reasons: ``ledger-corrupt``, ``ledger-foreign``, ``ledger-missing``, ``ledger-newer``,
    ``ledger-older``, ``ledger-unreadable``, ``ledger-unreachable``, ``ledger-locked``, ``ledger-closed``,
    ``ledger-put-back``, ``ledger-row`` (one job's record is damaged; the others can be claimed),
    ``driver-missing``.
    """

    reason = "ledger-unusable"

    def __str__(self) -> str:
        """Return the message and, if only a user can repair the ledger, the remedy."""
        named = self.reason in _REPAIRED_BY_USERS
        message = f"{self.args[0]}; {REASONS[self.reason].remedy}" if named else str(self.args[0])
        return message if self.reason in message else f"{message} ({self.reason})"


#: Only a user can repair these: the message names the remedy.
_REPAIRED_BY_USERS = frozenset(
    {
        "ledger-missing",
        "ledger-corrupt",
        "ledger-foreign",
        "ledger-newer",
        "ledger-older",
        "ledger-row",
        "ledger-put-back",
    }
)


class UnusableId(StreamingError, ValueError):
    """A work id or an artifact id contains what no database can store: NUL, or a lone surrogate."""

    reason = "unusable-id"


class KeyConflict(StreamingError):
    """The job key is taken by a job with another request (ledger rule 6, I18)."""

    reason = "key-conflict"


# -- this worker no longer has the right to write -------------------------------------------


class LeaseLost(StreamingError):
    """Another worker holds the job: nothing was changed and nothing may be (ledger rules 1 and 2)."""

    reason = "lease-lost"


class JobUnavailable(StreamingError):
    """The job is not granted now.

    Reasons: ``held`` (another worker has it), ``waiting`` (it backs off after a failure), ``dead`` (its
    attempts are spent; ``scrapy streaming requeue`` makes it ready again).
    """

    reason = "held"


class BlobGoing(StreamingError):
    """``gc`` is removing the blob: publish its bytes again, then complete again."""

    reason = "blob-going"


class ResultTooLarge(StreamingError, ValueError):
    """The result of an effect is larger than the ledger keeps; it is never cut (ledger rule 12)."""

    reason = "result-too-large"


# -- received bytes must not be published ------------------------------------------------


class PartCorrupt(StreamingError):
    """A part disagrees with its sidecar; it is thrown away and fetched again (R3, I10)."""

    reason = "corrupt-part"


class IntegrityError(StreamingError):
    """Bytes and their digest or length disagree; nothing was published (E9).

    Reasons: ``digest-mismatch``, ``length-mismatch``.
    """

    reason = "digest-mismatch"


class Undecodable(StreamingError):
    """Bytes are not in the content coding that their head names, or end too early (R34)."""

    reason = "undecodable"


class DecodedTooLarge(StreamingError):
    """A body is larger than the settings allow once it is decoded (E4)."""

    reason = "decoded-too-large"


class AnswerRefused(StreamingError):
    """The server's answer cannot be used and no other request would help.

    The reason is a word of the decision table.
    """

    reason = "answer-refused"


class HeadTooLarge(AnswerRefused):
    """The head of an answer, or a line of it, is larger than the limit (E5)."""

    reason = "head-too-large"


class EndUnmarked(AnswerRefused):
    """A body ended with its connection, and nothing proves that this was its end (RFC 9112 §8).

    ``sha256`` is that of all bytes received, 64 hex digits: if the same bytes come again, they are the whole.
    """

    reason = "close-delimited"

    def __init__(self, message: str, sha256: str) -> None:
        super().__init__(message)
        self.sha256 = sha256


class BodyConsumed(StreamingError):
    """Bytes of a response were read before it was handed over: the rest is not the whole body."""

    reason = "body-consumed"


class BodyIncomplete(StreamingError):
    """A body ended early; the next request, planned anew, resumes behind the bytes that are kept.

    ``kept`` is how many bytes of the representation are durable in the part.
    """

    reason = "incomplete"

    def __init__(self, message: str, kept: int) -> None:
        super().__init__(message)
        self.kept = kept


class RequestFailed(StreamingError):
    """There is no answer: no connection, or it broke before the head was complete."""

    reason = "no-answer"


class AddressRefused(StreamingError):
    """The server's address is not of the public Internet, and the settings allow no other."""

    reason = "private-address"

    def __init__(self, host: str, url: str) -> None:
        super().__init__(f"{url}: {host} is not public, and STREAMING_ALLOW_PRIVATE_ADDRESSES is off")


# -- the machine, not the server ------------------------------------------------------------


class WriteFailed(StreamingError):
    """Bytes could not be made durable; those of the last checkpoint are kept (storage rule 10).

    Reasons: ``no-space``, ``write-failed``, ``sync-failed``.
    """

    reason = "write-failed"
