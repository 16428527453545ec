"""The reasons: why each decision turned out as it did, and which request follows a refused answer.

What may live here: words, each declared once. The value of a ``Reason`` is the statistic's name, the
log's word and the test's id; its rows (R2 …) are those of the decision table in the documentation. Imports
nothing of the package, so that every module may import it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Self


class Recovery(enum.StrEnum):
    """How the next request differs from an ordinary one; a refusal names the one that follows it."""

    NONE = "none"  # an ordinary request
    REFETCH = "refetch"  # a plain GET; the part stays until a longer one is there
    DISCARD = "discard"  # a plain GET; the part is of another representation and is thrown away
    REFETCH_NO_CACHE = "refetch-no-cache"  # a plain GET past every cache
    CONFIRM = "confirm"  # a conditional GET with the part's own validators
    PROBE = "probe"  # a GET for the bytes behind the part's, to learn whether there are any
    WITHOUT_RANGE = "without-range"  # a plain GET; the part it brings is never resumed
    ORIGINAL = "original"  # an ordinary request, for the URL that redirected here
    SINGLE_SHOT = "single-shot"  # a plain GET; the server's validators change with every answer
    FAIL = "fail"  # no request follows: none would help

    @property
    def is_conditional(self) -> bool:
        """Whether the request may build on a part or on a stored representation."""
        return self in (Recovery.NONE, Recovery.ORIGINAL, Recovery.CONFIRM, Recovery.PROBE)


class Reason(enum.StrEnum):
    """Why: one stable word for each outcome, declared with its rows and its line in the documentation.

    A reason with a ``recovery`` refuses an answer, and the next request is that. A plain GET that is
    refused again always fails.
    """

    rows: str
    says: str
    recovery: Recovery | None

    def __new__(cls, word: str, rows: str = "", says: str = "", recovery: Recovery | None = None) -> Self:
        """Return the member that is *word*, with the rest as attributes."""
        member = str.__new__(cls, word)
        member._value_ = word
        member.rows, member.says, member.recovery = rows, says, recovery
        return member

    # plans
    NOTHING_STORED = "nothing-stored", "", "planned: nothing to build on, a plain GET"
    STRONG_VALIDATOR = "strong-validator", "R10", "planned: resume, by a strong entity-tag"
    STRONG_DATE = "strong-date", "R12", "planned: resume, by a strong date"
    WHOLE_PART = "whole-part", "R7", "planned: the part is whole and young enough, so no request is made"
    UNMODIFIED_SINCE = (
        "unmodified-since",
        "R5",
        "planned: resume, a weak tag with a strong date beside it, by `If-Unmodified-Since`",
    )
    WEAK_VALIDATOR = (
        "weak-validator",
        "R5, R47",
        (
            "planned: a weak tag and no strong date, or a tag that may confirm nothing "
            "(`STREAMING_WEAK_VALIDATORS`), from the first byte"
        ),
    )
    NO_VALIDATOR = "no-validator", "R6, R72", "planned: no usable validator, from the first byte"
    TAIL_OVERLAP = (
        "tail-overlap",
        "R6, R19",
        (
            "planned: resume without a strong validator (`STREAMING_UNVALIDATED_RESUME`): the end of the "
            "part is asked for again and compared"
        ),
    )
    FOREIGN_PART = "foreign-part", "R4", "planned: the part is of another URL or variant, from the first byte"
    CORRUPT_PART = "corrupt-part", "R3", "a part disagreed with its sidecar and was thrown away"
    RANGE_REFUSED_BEFORE = (
        "accept-ranges-none",
        "R71",
        "planned: the server supports no ranges (`Accept-Ranges: none`), from the first byte",
    )
    STORED = (
        "stored",
        "",
        "planned: ask whether the stored file is current; in a result: taken from the ledger",
    )
    ADOPTED = (
        "adopted",
        "",
        (
            "another program stored the file under this name (`FilesPipeline`, an earlier URL of it), or "
            "the ledger lost it (`rebuild`, an older backup), and it is not older than `FILES_EXPIRES`: "
            "hashed once and recorded, not fetched"
        ),
    )
    CONFIRM_WHOLE = (
        "confirm-whole",
        "R7, R50",
        "planned: ask whether a part is the whole, current representation",
    )
    PROBE_END = (
        "probe-end",
        "R33",
        "planned: nothing marked the end of a body; ask whether any byte is behind it",
    )
    UNSTABLE_VALIDATOR = (
        "unstable-validator",
        "R62",
        "planned: three resumptions in a row met another representation, so from the first byte",
    )
    RESUME_OFF = "resume-off", "", "planned: `STREAMING_RESUME_ENABLED` is off"
    OFFLINE = (
        "offline",
        "",
        "planned: `HTTPCACHE_IGNORE_MISSING` is on, so no request is sent; what the HTTP cache has is stored",
    )
    BARE = "bare-retry", "", "planned: a plain GET after a refused answer"
    # answers that are used
    FETCHED = "fetched", "R27", "the whole representation"
    TRANSFORMED = (
        "transformed",
        "R41, R76",
        (
            "the whole body, which a proxy changed on the way (203), or what a middleware or hook made "
            "of a response: never resumed, never revalidated"
        ),
    )
    JUST_MODIFIED = (
        "just-modified",
        "R75",
        (
            "the whole, changed so shortly before that the next change may not change the validators: "
            "stored without them"
        ),
    )
    CHANGED = "changed", "R28", "it changed: the new one, from the first byte"
    RANGE_IGNORED = "range-ignored", "R29", "unchanged, but the server sent all of it again"
    WHOLE_IN_206 = "whole-in-206", "R16", "all of it, in an answer that calls itself partial"
    RESUMED = "resumed", "R5, R10, R12, R23", "the rest, joined to the part"
    RESUMED_UNTAGGED = (
        "resumed-untagged",
        "R11",
        "the rest, without the tag it should have had, but with equal length and date or digest",
    )
    RESUMED_SHORT = "resumed-short", "R17", "less than the rest: joined, and asked for the remainder"
    RESUMED_UNVALIDATED = (
        "resumed-unvalidated",
        "R19",
        "the rest without a validator: joined if it begins with what the part ends with",
    )
    NOT_MODIFIED = "not-modified", "R43", "unchanged, no body"
    CONFIRMED_WHOLE = "confirmed-whole", "R7, R49, R50", "the part is whole: confirmed by a 304"
    PROBED_WHOLE = "probed-whole", "R33", "the part is whole: confirmed by a 416 with its length"
    UNCHANGED_CONTENT = "unchanged-content", "R48", "fetched, and the same bytes as before"
    PASS_ON = "pass-on", "R58, R59, R60", "no representation: Scrapy's other components handle it"
    # answers that are refused
    CHANGED_206 = (
        "changed-206",
        "R13",
        "refused: a piece of another representation, by any validator that both have",
        Recovery.DISCARD,
    )
    WEAKENED_206 = "weakened-206", "R14", "refused: the tag is no longer strong", Recovery.REFETCH
    UNPROVEN_206 = (
        "unproven-206",
        "R5, R11, R12, R33",
        "refused: nothing proves that the piece belongs to the part",
        Recovery.REFETCH,
    )
    RANGE_START = "range-start", "R15", "refused: the piece begins at another offset", Recovery.REFETCH
    UNKNOWN_TOTAL = (
        "unknown-total",
        "R18",
        "refused: the piece does not say how long the whole is",
        Recovery.REFETCH,
    )
    TOTAL_CHANGED = "total-changed", "R20", "refused: the complete length is another", Recovery.DISCARD
    BAD_CONTENT_RANGE = (
        "bad-content-range",
        "R21",
        "refused: `Content-Range` is missing, odd, or disagrees with the length",
        Recovery.REFETCH,
    )
    BAD_CONTENT_LENGTH = (
        "bad-content-length",
        "R38",
        "refused: more than one length, or one that is no number",
        Recovery.REFETCH,
    )
    MULTIPART_206 = "multipart-206", "R22", "refused: several pieces in one answer", Recovery.REFETCH
    CONTENT_RANGE_ON_200 = (
        "content-range-on-200",
        "R23",
        "refused: a piece that calls itself whole",
        Recovery.REFETCH,
    )
    RECODED_206 = "recoded-206", "R24", "refused: another content coding", Recovery.REFETCH
    UNSOLICITED_206 = (
        "unsolicited-206",
        "R25",
        "refused: a piece, where the whole was asked for",
        Recovery.REFETCH,
    )
    CODING_UNSUPPORTED = (
        "coding-unsupported",
        "R34",
        (
            "refused: a content coding that is unknown or cannot be decoded here (`br` needs brotli 1.2, "
            "`zstd` backports.zstd)"
        ),
        Recovery.REFETCH,
    )
    FOREIGN_304 = (
        "foreign-304",
        "R13, R45",
        'refused: "not modified", but of another representation by any validator that both have',
        Recovery.REFETCH_NO_CACHE,
    )
    UNASKED_304 = (
        "unasked-304",
        "R46",
        'refused: "not modified", where no condition was sent',
        Recovery.REFETCH_NO_CACHE,
    )
    MAYBE_WHOLE_416 = (
        "maybe-whole-416",
        "R50",
        "refused: no such range, where the part may be whole; asked again, conditionally",
        Recovery.CONFIRM,
    )
    SHRUNK = "shrunk", "R51", "refused: the representation is shorter than the part", Recovery.DISCARD
    CONTRADICTORY_416 = (
        "contradictory-416",
        "R52",
        "refused: no such range, by an answer whose length has it",
        Recovery.REFETCH,
    )
    BARE_416 = "bare-416", "R53", "refused: no such range, and no length either", Recovery.REFETCH
    PRECONDITION_FAILED = (
        "precondition-failed",
        "R56",
        "refused: the representation changed",
        Recovery.DISCARD,
    )
    RANGE_ERROR = (
        "range-error",
        "R55",
        (
            "refused: an error that a server may give only because of the range; asked once without it, "
            "and what comes is not resumed"
        ),
        Recovery.WITHOUT_RANGE,
    )
    EXPIRED_TARGET = (
        "expired-target",
        "R57",
        (
            "refused: an earlier redirect led to this URL, which is closed now; the URL that redirected "
            "is asked again"
        ),
        Recovery.ORIGINAL,
    )
    BLOB_MISSING = (
        "blob-missing",
        "R44",
        "unchanged, but the blob is gone: fetched again",
        Recovery.REFETCH_NO_CACHE,
    )
    DIGEST_MISMATCH = (
        "digest-mismatch",
        "R63",
        (
            "the bytes are not those that the caller expects or the server promised; fetched again once "
            "if they came in pieces"
        ),
        Recovery.DISCARD,
    )
    UNDECODABLE = (
        "undecodable",
        "R34",
        "a body that is not in its content coding, or ends too early",
        Recovery.DISCARD,
    )
    RANGE_CONTRADICTED = (
        "range-contradicted",
        "R74",
        "a body longer or shorter than its `Content-Range`: nothing of it is kept, the whole is asked for",
        Recovery.REFETCH,
    )
    # ends of bodies
    COMPLETE = "complete", "R27, R32", "a body that ended where it should"
    INCOMPLETE = "incomplete", "R31, R32, R61", "a body that ended early: its part stays"
    CLOSE_DELIMITED = (
        "close-delimited",
        "R33",
        (
            "a body whose end nothing marked: probed, until an answer says where it ends, the same bytes "
            "come twice (stored as `unproven`) or `STREAMING_RESTARTS` is spent"
        ),
        Recovery.PROBE,
    )
    SLICE_DIGEST_MISMATCH = (
        "slice-digest-mismatch",
        "R64",
        (
            "a piece that does not match its own `Content-Digest`: nothing of it is kept, it is asked "
            "for again, then the whole"
        ),
    )
    OVERLAP_MISMATCH = (
        "overlap-mismatch",
        "R19",
        (
            "the bytes asked for again are not those that the part ends with: nothing of the answer is "
            "kept, the whole is asked for"
        ),
    )


class Proof(enum.StrEnum):
    """Why published bytes are taken to be right, the best first, each with its line in the documentation."""

    says: str

    def __new__(cls, word: str, says: str = "") -> Self:
        """Return the member that is *word*, with its line."""
        member = str.__new__(cls, word)
        member._value_ = word
        member.says = says
        return member

    DIGEST = "digest", "they hash to the digest that you, or the server, gave"
    STRONG = "strong", "they came in pieces that a strong validator joined"
    LENGTH = "length", "they came in one answer, whole by its framing"
    UNPROVEN = (
        "unproven",
        (
            "only a closed connection marked their end, and the same bytes came twice. Never confirmed by "
            "a 304: fetched again once they are older than `FILES_EXPIRES`"
        ),
    )


#: Refusal → what follows.
REFUSALS: Final[Mapping[Reason, Recovery]] = MappingProxyType(
    {reason: reason.recovery for reason in Reason if reason.recovery is not None}
)
