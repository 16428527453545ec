"""Redaction: what is taken out of a text before it is stored or shown.

Credentials (E7), and characters that act on a terminal (E11). What may live here: functions from text to
text, and the two ways a line leaves the package: a stream, and a log record. The one module of its kind,
and the lowest: every other may import it, and none has patterns for credentials of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, TextIO

if TYPE_CHECKING:
    from logging import LogRecord

#: Replaces a credential.
LEFT_OUT: Final = "…"
#: Characters of a text with credentials that are searched; the rest is left out.
LONGEST: Final = 4096

# RFC 3986 §3.2: the authority ends at the first "/", "?" or "#"; userinfo ends at its last "@"
_URL_USERINFO = re.compile(r"\A([^/?#]*//)[^/?#]*@")

#: Each form that a credential has in a text; groups 1 and 2 are the text before and behind it, which stays.
_CREDENTIALS: Final = tuple(
    re.compile(pattern)
    for pattern in (
        # a database's URL, as SQLAlchemy reads it: a password may hold a slash
        r"(?i)\b(postgres\w*(?:\+\w+)?://)\S*(@)",
        # the userinfo of a URL
        r"(//)[^\s/?#]*(@)",
        # a URL whose password holds a slash: the text behind the colon is no port
        r"(//)[^\s/?#@:\[\]]*:(?!\d*(?:[/?#\s]|$))\S*(@)",
        # the same percent-encoded, once or more often
        r"(%(?:25)*2[Ff]%(?:25)*2[Ff])(?:(?!%(?:25)*2[Ff])[^\s/?#&])*(%(?:25)*40)",
        # user:password@host without a scheme, plain and percent-encoded
        r"(?<![^\s\"'<>(\[{,;=|])(?<!/\[)()[^\s/@:\"'<>()\[\]{},;=|]*:(?!//)\S*(@)(?=[\w\[%.-])",
        r"(?<![^\s\"'<>(\[{,;=|])(?<!/\[)()[^\s/@:\"'<>()\[\]{},;=|&?]*%(?:25)*3[Aa](?!%(?:25)*2[Ff])[^\s&/?#]*(%(?:25)*40)",
        # a user alone, where a host is named
        r"(?i)(\b(?:host(?:name)?|lookup|address)\b:?[\s'\"]+)[^\s/@]+(@)",
        # the standard library's message on the port of such a URL
        r"(integer value as )[^\s]+()",
        # parameters of a database's URL; fields of a request
        r"(?i)((?:password|passfile|passwd)=)[^&\s]*()",
        r"(?i)(authorization['\"]?\s*[:=]\s*)(?:[\[b'\"]*)(?:\w+\s+)?[^\s'\",\]]+()",
        r"(\b(?:Basic|Bearer) )[\w+/=.~-]{6,}()",
    )
)

#: What each of these forms contains: a cheap test that nearly every text fails.
_SUSPECT = re.compile(r"@|%(?:25)*40|(?i:integer value as |pass|authorization|basic |bearer )")
_MAY_BEGIN_ONE = re.compile(r"[:/%=]")

# control characters; marks and controls of direction; separators of lines and paragraphs; lone surrogates
_ACTING = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def url_without_userinfo(url: str) -> str:
    """Return *url* without ``user:password@`` (RFC 3986 §3.2.1); the rest names what it names."""
    return _URL_USERINFO.sub(r"\1", url)


def without_credentials(text: str) -> str:
    """Return *text* with ``…`` for each user and password in it, of a URL or of a host alone (E7).

    A URL's path and query stay, as they do in a job's URL. In doubt more is left out, not less.
    """
    if _SUSPECT.search(text) is None:
        return text
    if len(text) > LONGEST:
        text = _cut(text)
    for pattern in _CREDENTIALS:
        text = pattern.sub(rf"\1{LEFT_OUT}\2", text)
    return text


def _cut(text: str) -> str:
    """Return the beginning of *text*, cut so that no password stays without the ``@`` that marks it."""
    kept, space, last = text[:LONGEST].rpartition(" ")
    return text[:LONGEST] if _MAY_BEGIN_ONE.search(last) is None else f"{kept}{space}{LEFT_OUT}"


def escaped(text: str, *, keep: str = "") -> str:
    r"""Return *text* with each character that acts on a terminal as ``\x1b`` or ``\u202e``, except *keep*."""
    return _ACTING.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def _escape(char: str) -> str:
    number = ord(char)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"


def clean(text: object) -> str:
    """Return *text* as it may be shown: without credentials, and with nothing that acts on a terminal."""
    return escaped(without_credentials(str(text)))


def write_lines(stream: TextIO, text: str) -> None:
    """Write *text* and a newline; of the control characters in it only tabs and newlines act."""
    stream.write(escaped(text, keep="\n\t") + "\n")


def clean_record(record: LogRecord) -> bool:
    """Clean the values of a log record and let it pass; every logger of the package has this filter."""
    values = record.args
    if isinstance(values, Mapping):
        record.args = {name: _clean_value(value) for name, value in values.items()}
    elif values:
        record.args = tuple(_clean_value(value) for value in values)
    return True


def _clean_value(value: object) -> object:
    return value if isinstance(value, int | float) or value is None else clean(value)
