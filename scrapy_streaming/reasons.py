"""What each reason of a failed file means, and its remedy, but for refused answers.

What may live here: words. Every other module may import this one. ``explanations`` is the whole table: a
refused answer is explained where its reason is declared, in ``protocol.reasons``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True)
class Why:
    """What a reason means, and the remedy: what happens next, or what a person can do."""

    meaning: str
    remedy: str


_RETRIED = "the next crawl tries again"
_GOES_ON = "the next crawl goes on from the bytes that are kept"
#: The remedy of an answer that cannot be used.
SERVER: Final = (
    "the server contradicts itself; "
    + _RETRIED
    + "; STREAMING_RESUME_ENABLED=False asks for whole files only"
)
_REBUILD = (
    "put the ledger back from a backup, or run `scrapy streaming rebuild`, which makes one from the "
    "files in the store and keeps what is there aside"
)
_RIGHTS = "check owner, mode and disk of FILES_STORE and STREAMING_DIR; " + _RETRIED
_DATABASE = "check the database and STREAMING_DATABASE_URL; " + _RETRIED

#: The group of reasons that refused answers are explained in, too.
UNUSABLE_ANSWERS: Final = "An answer that cannot be used"

#: Reasons by what they are about; ``bad-status-4xx`` stands for the statuses that are not named.
GROUPS: Final[Mapping[str, Mapping[str, Why]]] = MappingProxyType(
    {
        "What the server said": {
            "bad-status-400": Why(
                "the server calls the request malformed", "look at the URL and at the fields that are sent"
            ),
            "bad-status-401": Why(
                "the server wants a login", "give the request credentials (`http_user`, cookies, a header)"
            ),
            "bad-status-403": Why(
                "the server refuses this client", "look at cookies, Referer and USER_AGENT; crawl more slowly"
            ),
            "bad-status-404": Why("the server has no such file", "correct the URL where it came from"),
            "bad-status-407": Why("the proxy wants a login", "put user and password into the proxy's URL"),
            "bad-status-408": Why("the server waited too long for the request", _RETRIED),
            "bad-status-410": Why("the file was there and is gone for good", "take the URL off the list"),
            "bad-status-429": Why(
                "too many requests for this server",
                "raise DOWNLOAD_DELAY or lower CONCURRENT_REQUESTS_PER_DOMAIN; Retry-After is kept",
            ),
            "bad-status-451": Why("withheld for legal reasons", "take the URL off the list"),
            "bad-status-3xx": Why(
                "the server answers with a redirect", "set MEDIA_ALLOW_REDIRECTS=True to follow it"
            ),
            "bad-status-4xx": Why(
                "the server refuses the request", "look at the URL and at the fields that are sent"
            ),
            "bad-status-5xx": Why("the server failed", _RETRIED),
            "bad-status-other": Why(
                "the answer is no whole file", "look at what the server sends for this URL"
            ),
            "empty-content": Why(
                "a middleware or a hook made the body empty, or the answer to another method than GET is",
                "look at the project's middlewares and hooks",
            ),
            "head-too-large": Why(
                "the head of the answer is larger than 256 KiB, or a line of it than 64 KiB",
                "the server is broken or hostile; take the URL off the list",
            ),
        },
        "The connection": {
            "cannot-resolve": Why(
                "the host's name has no address", "check the URL's host and the machine's DNS; " + _RETRIED
            ),
            "connection-refused": Why(
                "no server listens at the host's port", "check host and port; " + _RETRIED
            ),
            "connection-failed": Why(
                "the connection could not be made, or broke before an answer came",
                "check the network; " + _RETRIED,
            ),
            "timed-out": Why(
                "no answer within DOWNLOAD_TIMEOUT",
                "raise DOWNLOAD_TIMEOUT or crawl more slowly; " + _RETRIED,
            ),
            "tunnel-failed": Why("the proxy does not connect to the host", "check the proxy; " + _RETRIED),
            "unsupported-scheme": Why(
                "no download handler serves the URL's scheme",
                "correct the URL, or name a handler in DOWNLOAD_HANDLERS",
            ),
            "private-address": Why(
                "the server's address is not of the public Internet",
                "set STREAMING_ALLOW_PRIVATE_ADDRESSES=True if you trust the URLs",
            ),
            "stalled": Why("no byte for STREAMING_STALL_TIMEOUT seconds", _GOES_ON),
            "too-slow": Why(
                "slower than STREAMING_MIN_RATE",
                _GOES_ON + "; lower STREAMING_MIN_RATE if the server is no faster",
            ),
            "incomplete": Why("the body ended early", _GOES_ON),
            "incomplete-dataloss": Why("Scrapy says that the body may be cut", _RETRIED),
            "incomplete-partial": Why("Scrapy says that the body may be cut", _RETRIED),
            "incomplete-download-stopped": Why(
                "a handler of `bytes_received` or `headers_received` stopped the download",
                "look at the project's StopDownload",
            ),
        },
        "The bytes": {
            "digest-mismatch": Why(
                "the bytes are not those that were expected, or that the server promised",
                "look at them in `.streaming/quarantine/`; correct the expected digest, or crawl again",
            ),
            "length-mismatch": Why(
                "the bytes are more or fewer than their record says",
                "run `scrapy streaming verify`; " + _RETRIED,
            ),
            "slice-digest-mismatch": Why("a piece does not match its own Content-Digest", _RETRIED),
            "undecodable": Why("the body is not in the coding that its head names", _RETRIED),
            "coding-unsupported": Why(
                "the body came in a coding that cannot be decoded here",
                "install brotli>=1.2 (br) or backports.zstd (zstd)",
            ),
            "too-large": Why(
                "larger than STREAMING_MAX_SIZE, DOWNLOAD_MAXSIZE or `download_maxsize`",
                "raise the limit, or take the URL off the list",
            ),
            "decoded-too-large": Why(
                "what the body decodes to is larger than STREAMING_MAX_SIZE or DOWNLOAD_MAXSIZE",
                "raise the limit, or take the URL off the list",
            ),
            "close-delimited": Why(
                "nothing says where the body ends, so it may be cut",
                "raise STREAMING_RESTARTS, or give an expected digest",
            ),
            "overlap-mismatch": Why(
                "the answer does not begin with the end of the bytes that are kept",
                _RETRIED + " from the first byte",
            ),
            "corrupt-part": Why(
                "the bytes kept of the file were changed from outside", _RETRIED + " from the first byte"
            ),
            "blob-missing": Why("the stored bytes are gone", _RETRIED + " and fetches it"),
        },
        UNUSABLE_ANSWERS: {
            "range-contradicted": Why("a body that is not what its Content-Range says", SERVER),
            "transformed": Why(
                "a middleware changed an answer that has no body",
                "look at the project's middlewares; " + _RETRIED,
            ),
            "changed": Why(
                "the file is another one than the part's", "run its spider: it asks for the new file"
            ),
            "answer-refused": Why("the answer cannot be used", _RETRIED),
        },
        "The project": {
            "refused-by-hook": Why(
                "a hook of the project refused the file", "look at the project's pipeline"
            ),
            "filtered": Why(
                "a middleware or robots.txt let no request leave",
                "look at robots.txt, offsite and the project's middlewares",
            ),
            "bad-expected-digest": Why(
                "the expected digest cannot be read", "write it as `sha256:` and 64 hex digits"
            ),
            "unusable-id": Why(
                "a work id or artifact id that no database can store",
                "take NUL and lone surrogates out of it",
            ),
            "key-conflict": Why(
                "two different requests have one job key",
                'give one its own `meta["streaming"]["artifact_id"]`',
            ),
            "own-request": Why(
                "`scrapy streaming resume` cannot prove what another request would bring",
                "run the file's own spider",
            ),
            "unreadable-setting": Why(
                "a setting cannot be read", "correct it: the message says what is allowed"
            ),
        },
        "The job": {
            "held": Why("another worker has the job", "it stores the file; STREAMING_HELD=wait waits for it"),
            "waiting": Why("the job backs off after an earlier failure", _RETRIED),
            "dead": Why(
                "every attempt was spent", "run `scrapy streaming requeue --failed`, then crawl again"
            ),
            "attempts-exhausted": Why(
                "STREAMING_MAX_ATTEMPTS workers in a row died while they had the job",
                "look at why they died (memory?), then run `scrapy streaming requeue --failed`",
            ),
            "lease-lost": Why(
                "another worker took the job over",
                "it stores the file; raise STREAMING_LEASE_SECONDS if that is frequent",
            ),
            "crawl-stopping": Why("the user stopped the crawl", _GOES_ON),
            "blob-going": Why("`gc` was removing the same bytes", _RETRIED),
            "result-too-large": Why("the result of an effect is larger than 16 KiB", "record less"),
        },
        "The store": {
            "no-space": Why("the disk is full", "make room (`scrapy streaming gc --dry-run`); " + _GOES_ON),
            "write-failed": Why("the disk refused the bytes", _RIGHTS),
            "sync-failed": Why(
                "the disk did not make the bytes durable", "check the disk: it may be failing; " + _RETRIED
            ),
            "store-unsafe": Why(
                "`file_path()` gave a name that no file of the store can have, or a link stands in the way",
                "correct `file_path()`, or remove what the message names",
            ),
            "store-unusable": Why("the store cannot be used", _RIGHTS),
            "store-not-writable": Why("the store cannot be written", _RIGHTS),
            "store-format": Why("the store is of another format", "use the release that made it"),
            "finalization-off": Why(
                "the bytes have no name, and STREAMING_FINALIZATION_ENABLED is off",
                "set STREAMING_FINALIZATION_ENABLED=True",
            ),
            "not-adopted": Why(
                "a file that is in the store is not taken over", "the message says why; " + _RETRIED
            ),
            "store-missing": Why("there is no store yet", "run a crawl with this FILES_STORE"),
            "maintenance-runs": Why("another verify, gc or rebuild runs", "wait for it"),
            "streaming-error": Why("an error of scrapy-streaming", "report it with the lines around it"),
        },
        "The ledger": {
            "ledger-missing": Why("the ledger is gone", _REBUILD),
            "ledger-corrupt": Why("the ledger is damaged", _REBUILD),
            "ledger-foreign": Why(
                "the ledger is another store's",
                "name this store's own in STREAMING_DATABASE_URL, or " + _REBUILD,
            ),
            "ledger-newer": Why("a newer release made the ledger", "upgrade scrapy-streaming"),
            "ledger-older": Why("an older release made the ledger", "run `scrapy streaming migrate`"),
            "ledger-row": Why(
                "the job's record is damaged",
                "stop the crawls and run `scrapy streaming rebuild`: a new ledger, this one kept aside",
            ),
            "ledger-behind": Why(
                "a crawl ran without the ledger and may have stored files that it does not have",
                "run a crawl or `scrapy streaming rebuild`: both read the store",
            ),
            "ledger-put-back": Why(
                "an older copy of the ledger was put back",
                "run a crawl or `scrapy streaming rebuild`: both read the store",
            ),
            "ledger-unusable": Why("the ledger refused a statement", _DATABASE),
            "ledger-unreadable": Why("the ledger cannot be opened, read or written", _DATABASE),
            "ledger-unreachable": Why("the database server does not answer", _DATABASE),
            "ledger-locked": Why(
                "another process keeps the ledger locked",
                "end a process that is stopped in the middle; " + _RETRIED,
            ),
            "ledger-closed": Why("the crawl had ended already", _RETRIED),
            "ledger-off": Why(
                "no ledger is opened",
                "set STREAMING_SCHEMA_ENABLED=True and STREAMING_IDEMPOTENCY_ENABLED=True",
            ),
            "driver-missing": Why(
                "the database's driver is not installed", "pip install 'scrapy-streaming[postgres]'"
            ),
        },
        "A program of your own (`scrapy_streaming.integration`)": {
            "no-answer": Why("the server was not reached, or broke off before the head", "call again"),
            "body-consumed": Why(
                "bytes of the response were read before it was handed over",
                "hand it over unread, as a stream",
            ),
            "foreign-part": Why(
                "the part is of another URL or variant", "name another part, or decide anew with its own URL"
            ),
            "part-busy": Why("another process writes the part", "wait for it, or end it"),
            "part-missing": Why(
                "the file that was to be published cannot be read", "check its path and rights"
            ),
        },
    }
)

REASONS: Final[Mapping[str, Why]] = MappingProxyType(
    {reason: why for group in GROUPS.values() for reason, why in group.items()}
)
