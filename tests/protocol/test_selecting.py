"""Which requests a stored representation answers without asking the server (row R40)."""

from __future__ import annotations

import pytest

from scrapy_streaming.protocol.jobs import StoredRepresentation
from scrapy_streaming.protocol.selecting import selecting_key, selects_again
from scrapy_streaming.protocol.validators import Validators

URL = "https://example.org/a.bin"


@pytest.mark.parametrize(
    ("vary", "asked", "again"),
    [
        ((), {"accept-language": "en"}, True),
        (("accept-encoding", "range"), {"accept-language": "en"}, True),
        (("accept-language",), {"accept-language": "de"}, True),
        (("accept-language",), {"accept-language": "en"}, False),
        (("accept-language",), {"accept-language": "de", "authorization": "x"}, False),
        (("accept-encoding", "accept-language"), {"accept-language": "de", "accept-encoding": "br"}, True),
        (("cookie",), {"accept-language": "de"}, False),
        (("*",), {"accept-language": "de"}, False),
    ],
)
def test_what_is_stored_answers_only_what_selects_it_again(
    vary: tuple[str, ...], asked: dict[str, str], again: bool
) -> None:
    """R40, RFC 9110 §12.5.5."""
    selecting = selecting_key(vary, {"accept-language": "de"})
    known = StoredRepresentation("sha256:" + "ab" * 32, 1, Validators(), URL, vary=vary, selecting=selecting)
    assert selects_again(known, asked) is again
