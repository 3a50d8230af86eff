"""Addresses of servers, and what is said where none answers."""

from __future__ import annotations

import pytest

from scumble.connection import Connection, channel_options, parse_url
from scumble.errors import InvalidRequest, Unavailable


@pytest.mark.parametrize(
    ("url", "target", "secure"),
    [
        ("localhost:8001", "localhost:8001", False),
        ("grpc://a.example:1/", "a.example:1", False),
        ("grpcs://a.example:443", "a.example:443", True),
        ("[::1]:8001", "[::1]:8001", False),
    ],
)
def test_addresses_are_read_as_they_are_printed(url: str, target: str, secure: bool) -> None:
    assert parse_url(url) == (target, secure)


@pytest.mark.parametrize("url", ["", "localhost", "http://a:8000", ":8001", "a:", "a:b", "://a:1"])
def test_what_is_no_address_is_refused_with_what_would_be_one(url: str) -> None:
    with pytest.raises(InvalidRequest, match=r"host:port or grpc\[s\]://host:port") as refused:
        Connection(url)
    assert refused.value.fields["field"] == "url"


def test_this_machines_own_addresses_go_through_no_proxy() -> None:
    direct = ("grpc.enable_http_proxy", 0)
    assert all(direct in channel_options(target) for target in ("localhost:1", "127.0.0.1:1", "127.8.8.8:1", "[::1]:1"))
    assert not any(
        direct in channel_options(target) for target in ("10.0.0.1:1", "a.localhost.example:1", "[2001:db8::1]:1")
    )


def test_where_nobody_answers_the_way_to_start_one_is_said() -> None:
    connection = Connection("127.0.0.1:9")
    with pytest.raises(Unavailable, match=r"no Scumble server answers at 127\.0\.0\.1:9 .*scumble serve"):
        connection.is_live(timeout=5)
    connection.close()
