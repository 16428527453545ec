"""Which addresses are public (E3)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scrapy_streaming.protocol.addresses import is_public


@pytest.mark.parametrize(
    "text",
    [
        "8.8.8.8",
        "2606:4700:4700::1111",
        "::ffff:8.8.8.8",
        "64:ff9b::8.8.8.8",
        "2002:808:808::1",
    ],
)
def test_public(text):
    assert is_public(text)


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1",
        "127.255.0.9",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "192.0.2.1",
        "::",
        "::1",
        "::127.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "64:ff9b::127.0.0.1",
        "64:ff9b::10.0.0.1",
        "64:ff9b:1::1",
        "2002:7f00:1::",
        "2002:a00:1::1",
        "2001:db8::1",
        "2001::1",
        "fc00::1",
        "fd12:3456::1",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "ff02::1",
        "",
        "None",
        "localhost",
        "127.1",
        "0x7f.1",
        "2130706433",
        "/run/server.sock",
    ],
)
def test_not_public(text):
    assert not is_public(text)


@given(st.ip_addresses(v=4))
def test_a_form_of_an_ipv4_address_is_as_public_as_the_address(address):
    as_hex = f"{int(address) >> 16:x}:{int(address) & 0xFFFF:x}"
    for form in (f"::ffff:{address}", f"64:ff9b::{address}", f"2002:{as_hex}::"):
        assert is_public(form) == is_public(str(address))


@given(st.text())
def test_what_is_no_address_is_not_public(text):
    assert not is_public("x" + text)
