"""Why each decision falls out as it does, and which request follows a refused answer.

What may live here: words and the one table that joins them. The value of a ``Reason`` is the
statistic's name, the log's word and the test's id; the rows beside them (R2 …) are those of the
decision table in the documentation.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final


class Reason(enum.StrEnum):
    """Why: one stable word for each outcome."""

    # plans
    NOTHING_STORED = "nothing-stored"
    STRONG_VALIDATOR = "strong-validator"  # Ps
    STRONG_DATE = "strong-date"  # Pd
    WHOLE_PART = "whole-part"  # R7
    UNMODIFIED_SINCE = "unmodified-since"  # R5
    WEAK_VALIDATOR = "weak-validator"  # R5
    NO_VALIDATOR = "no-validator"  # R6, R72
    TAIL_OVERLAP = "tail-overlap"  # R6, R19
    FOREIGN_PART = "foreign-part"  # R4
    CORRUPT_PART = "corrupt-part"  # R3
    RANGE_REFUSED_BEFORE = "accept-ranges-none"  # R71
    STORED = "stored"  # B
    ADOPTED = "adopted"  # in the store, and the ledger has forgotten whence (I16)
    CONFIRM_WHOLE = "confirm-whole"  # R7, R50
    PROBE_END = "probe-end"  # R33
    UNSTABLE_VALIDATOR = "unstable-validator"  # R62
    RESUME_OFF = "resume-off"
    OFFLINE = "offline"
    BARE = "bare-retry"
    # answers that are used
    FETCHED = "fetched"  # R27
    TRANSFORMED = "transformed"  # R41, R76
    JUST_MODIFIED = "just-modified"  # R75
    CHANGED = "changed"  # R28
    RANGE_IGNORED = "range-ignored"  # R29
    WHOLE_IN_206 = "whole-in-206"  # R16
    RESUMED = "resumed"  # R10, R12
    RESUMED_UNTAGGED = "resumed-untagged"  # R11
    RESUMED_SHORT = "resumed-short"  # R17
    RESUMED_UNVALIDATED = "resumed-unvalidated"  # R19
    NOT_MODIFIED = "not-modified"  # R43
    CONFIRMED_WHOLE = "confirmed-whole"  # R7, R49, R50
    PROBED_WHOLE = "probed-whole"  # R33
    UNCHANGED_CONTENT = "unchanged-content"  # R48
    PASS_ON = "pass-on"  # R58 to R60
    # answers that are refused
    CHANGED_206 = "changed-206"  # R13
    WEAKENED_206 = "weakened-206"  # R14
    UNPROVEN_206 = "unproven-206"  # R11, R12
    RANGE_START = "range-start"  # R15
    UNKNOWN_TOTAL = "unknown-total"  # R18
    TOTAL_CHANGED = "total-changed"  # R20
    BAD_CONTENT_RANGE = "bad-content-range"  # R21
    BAD_CONTENT_LENGTH = "bad-content-length"  # R38
    MULTIPART_206 = "multipart-206"  # R22
    CONTENT_RANGE_ON_200 = "content-range-on-200"  # R23
    RECODED_206 = "recoded-206"  # R24
    UNSOLICITED_206 = "unsolicited-206"  # R25
    CODING_UNSUPPORTED = "coding-unsupported"  # R34
    FOREIGN_304 = "foreign-304"  # R45
    UNASKED_304 = "unasked-304"  # R46
    MAYBE_WHOLE_416 = "maybe-whole-416"  # R50
    SHRUNK = "shrunk"  # R51
    CONTRADICTORY_416 = "contradictory-416"  # R52
    BARE_416 = "bare-416"  # R53
    PRECONDITION_FAILED = "precondition-failed"  # R56
    RANGE_ERROR = "range-error"  # R55
    EXPIRED_TARGET = "expired-target"  # R57
    BLOB_MISSING = "blob-missing"  # R44
    DIGEST_MISMATCH = "digest-mismatch"  # R63
    UNDECODABLE = "undecodable"  # R34
    RANGE_CONTRADICTED = "range-contradicted"  # R74
    # ends of bodies
    COMPLETE = "complete"  # R27, R32
    INCOMPLETE = "incomplete"  # R31, R32, R61
    CLOSE_DELIMITED = "close-delimited"  # R33
    SLICE_DIGEST_MISMATCH = "slice-digest-mismatch"  # R64
    OVERLAP_MISMATCH = "overlap-mismatch"  # R19


class Proof(enum.StrEnum):
    """What it rests on that published bytes are right, the best first."""

    DIGEST = "digest"  # they hash to what the caller, or the server, said
    STRONG = "strong"  # pieces joined under a strong validator
    LENGTH = "length"  # one answer, whole by its framing
    UNPROVEN = "unproven"  # nothing but the closed connection marked the end


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


#: Refusal → what follows, in one table. A plain GET that is refused again always fails.
REFUSALS: Final[Mapping[Reason, Recovery]] = MappingProxyType(
    {
        Reason.CHANGED_206: Recovery.DISCARD,
        Reason.WEAKENED_206: Recovery.REFETCH,
        Reason.UNPROVEN_206: Recovery.REFETCH,
        Reason.RANGE_START: Recovery.REFETCH,
        Reason.UNKNOWN_TOTAL: Recovery.REFETCH,
        Reason.TOTAL_CHANGED: Recovery.DISCARD,
        Reason.BAD_CONTENT_RANGE: Recovery.REFETCH,
        Reason.BAD_CONTENT_LENGTH: Recovery.REFETCH,
        Reason.MULTIPART_206: Recovery.REFETCH,
        Reason.CONTENT_RANGE_ON_200: Recovery.REFETCH,
        Reason.RECODED_206: Recovery.REFETCH,
        Reason.UNSOLICITED_206: Recovery.REFETCH,
        Reason.FOREIGN_304: Recovery.REFETCH_NO_CACHE,
        Reason.UNASKED_304: Recovery.REFETCH_NO_CACHE,
        Reason.BLOB_MISSING: Recovery.REFETCH_NO_CACHE,
        Reason.DIGEST_MISMATCH: Recovery.DISCARD,
        Reason.UNDECODABLE: Recovery.DISCARD,
        Reason.CODING_UNSUPPORTED: Recovery.REFETCH,
        Reason.RANGE_CONTRADICTED: Recovery.REFETCH,
        Reason.CLOSE_DELIMITED: Recovery.PROBE,
        Reason.MAYBE_WHOLE_416: Recovery.CONFIRM,
        Reason.SHRUNK: Recovery.DISCARD,
        Reason.CONTRADICTORY_416: Recovery.REFETCH,
        Reason.BARE_416: Recovery.REFETCH,
        Reason.PRECONDITION_FAILED: Recovery.DISCARD,
        Reason.RANGE_ERROR: Recovery.WITHOUT_RANGE,
        Reason.EXPIRED_TARGET: Recovery.ORIGINAL,
    }
)
