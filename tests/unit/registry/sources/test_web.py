"""Fetching over https, from a real TLS server on loopback that a rule of the test's own lets in."""

from __future__ import annotations

import ipaddress
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from scumble.errors import IntegrityError, InvalidRequest, NotFound, Refused, ScumbleError, Unavailable
from scumble_registry import Registry
from scumble_registry.importing import import_from
from scumble_registry.sources import addresses
from scumble_registry.sources.addresses import is_public
from scumble_registry.sources.web import Rules, fetch, file_name, redacted, token_for
from support.stand_ins import Answer, reply, serving, sha256

HOSTS = ("localhost", "files.example", "civitai.com", "storage.example", "127.0.0.1")
DATA = b"weights" * 1000


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def rules(authority: trustme.CA) -> Rules:
    """Loopback is let in, and the test's authority trusted."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return Rules(allowed=lambda address: address.is_loopback, context=context, read_seconds=0.5)


@pytest.fixture
def serve(authority: trustme.CA, monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], Any]:
    """`with serve(answer) as port`, by any of HOSTS' names."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*HOSTS).configure_cert(context)
    known = socket.getaddrinfo

    def look_up(host: str, *arguments: Any, **named: Any) -> Any:
        return known("127.0.0.1" if host in HOSTS else host, *arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)

    @contextmanager
    def server(answer: Answer) -> Iterator[int]:
        with serving(answer, context) as port:
            yield port

    return server


def send(body: bytes = DATA, status: int = 200, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler: reply(handler, status, named, body)


def test_a_file_comes_with_its_name_digest_and_time(serve: Any, rules: Rules, tmp_path: Path) -> None:
    headers = {
        "Content_Disposition": "attachment; filename*=UTF-8''ink%20v2.safetensors",
        "Last_Modified": "Wed, 04 Nov 2026 10:00:00 GMT",
    }
    with serve(send(**headers)) as port:
        fetched = fetch(f"https://files.example:{port}/get?id=3&token=secret", tmp_path, rules=rules)
    assert fetched.path == tmp_path / "ink v2.safetensors"
    assert fetched.path.read_bytes() == DATA
    assert fetched.origin == {
        "url": f"https://files.example:{port}/get?id=3",
        "sha256": sha256(DATA),
        "modified": "2026-11-04T10:00:00+00:00",
        "file": "ink v2.safetensors",
    }


def test_it_is_published_and_twice_is_once(serve: Any, rules: Rules, registry: Registry, lora: Path) -> None:
    data = lora.read_bytes()
    with serve(send(data)) as port:
        url = f"https://files.example:{port}/ink.safetensors"
        first = import_from(registry, url, "styles/ink", sha256=sha256(data), rules=rules)
        assert import_from(registry, url, "styles/ink", rules=rules) == first
        with pytest.raises(IntegrityError, match="check the URL and the digest"):
            import_from(registry, url, "styles/oil", sha256="0" * 64, rules=rules)
        with pytest.raises(InvalidRequest, match="64 hexadecimal"):
            import_from(registry, url, "styles/oil", sha256="abc", rules=rules)
        with pytest.raises(InvalidRequest, match="--include"):
            import_from(registry, url, "styles/oil", include=["*"], rules=rules)
    assert registry.names() == ("styles/ink",)


def test_loopback_is_refused_unless_a_test_lets_it_in(serve: Any, rules: Rules, tmp_path: Path) -> None:
    seen: list[str] = []
    with serve(lambda handler: seen.append(handler.path)) as port:
        for host in ("localhost", "files.example", "127.0.0.1"):
            with pytest.raises(Refused, match="no public address"):
                fetch(f"https://{host}:{port}/a", tmp_path, rules=replace(rules, allowed=is_public))
    assert seen == []


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "10.1.2.3",
        "100.64.0.1",
        "127.0.0.1",
        "169.254.169.254",
        "172.16.0.1",
        "192.168.0.1",
        "192.0.2.1",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::",
        "fc00::1",
        "fe80::1",
        "ff02::1",
        "2001:db8::1",
        "fec0::1",
    ],
)
def test_addresses_inside_networks_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["1.1.1.1", "104.18.0.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


def test_one_private_address_among_public_ones_is_enough(
    rules: Rules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [(socket.AF_INET, 1, 6, "", (each, 443)) for each in ("1.1.1.1", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(Refused, match=r"10\.0\.0\.1"):
        fetch("https://files.example/a", tmp_path, rules=replace(rules, allowed=is_public))


def test_a_name_that_means_something_else_a_moment_later_is_asked_for_once(
    serve: Any, rules: Rules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: the connection goes to the address that was judged."""
    asked: list[str] = []

    def rebinding(host: str, port: int, *_: Any, **__: Any) -> Any:
        if host == "files.example":
            asked.append(host)
        address = "127.0.0.1" if asked == ["files.example"] or host != "files.example" else "10.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    with serve(send()) as port:
        monkeypatch.setattr(socket, "getaddrinfo", rebinding)
        assert fetch(f"https://files.example:{port}/a", tmp_path, rules=rules).path.read_bytes() == DATA
    assert asked == ["files.example"]


def test_redirects_are_followed_and_tokens_are_not_passed_on(
    serve: Any, rules: Rules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIVITAI_TOKEN", "civitai-secret")
    seen: list[tuple[str, str | None]] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        host = str(handler.headers["Host"])
        seen.append((host.partition(":")[0], handler.headers.get("Authorization")))
        if host.startswith("civitai.com"):
            location = f"https://storage.example:{handler.server.server_address[1]}/x?X-Amz-Signature=signed"
            return reply(handler, 307, {"Location": location})
        return reply(handler, 200, {}, DATA)

    with serve(answer) as port:
        fetched = fetch(f"https://civitai.com:{port}/api/download/models/77?type=Model", tmp_path, rules=rules)
    assert seen == [("civitai.com", "Bearer civitai-secret"), ("storage.example", None)]
    assert fetched.origin["url"] == f"https://civitai.com:{port}/api/download/models/77?type=Model"
    assert "secret" not in str(fetched) and "signed" not in str(fetched)


@pytest.mark.parametrize(
    ("location", "error", "says"),
    [
        ("http://files.example/a", Refused, "is not https"),
        ("https://10.0.0.1/a", Refused, "no public address"),
        ("https://[::ffff:10.0.0.1]/a", Refused, "no public address"),
        ("file:///etc/passwd", Refused, "is not https"),
        ("https://user:pass@files.example/a", InvalidRequest, "password"),
        ("/again", Refused, "more than 5 redirects"),
    ],
)
def test_every_redirect_is_judged_again(
    serve: Any, rules: Rules, tmp_path: Path, location: str, error: type[ScumbleError], says: str
) -> None:
    with serve(send(b"", 302, Location=location)) as port, pytest.raises(error, match=says):
        fetch(f"https://files.example:{port}/a", tmp_path, rules=rules)
    assert list(tmp_path.iterdir()) == []


def test_proxies_of_the_environment_are_ignored(
    serve: Any, rules: Rules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with serve(send()) as port:
        assert fetch(f"https://files.example:{port}/a", tmp_path, rules=rules).path.read_bytes() == DATA


def test_a_certificate_that_nobody_trusts_is_unavailable(serve: Any, rules: Rules, tmp_path: Path) -> None:
    with serve(send()) as port, pytest.raises(Unavailable, match="could not be fetched"):
        fetch(f"https://files.example:{port}/a", tmp_path, rules=replace(rules, context=ssl.create_default_context()))


def test_too_many_bytes_are_refused_by_what_the_server_says(serve: Any, rules: Rules, tmp_path: Path) -> None:
    with serve(send()) as port, pytest.raises(Refused, match="7,000 bytes or more; at most 6,999"):
        fetch(f"https://files.example:{port}/a", tmp_path, max_bytes=6999, rules=rules)
    assert list(tmp_path.iterdir()) == []


def test_too_many_bytes_are_refused_by_what_comes(serve: Any, rules: Rules, registry: Registry, home: Path) -> None:
    """A server that says no length, and would go on for ever."""

    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        while True:
            handler.wfile.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")

    with serve(endless) as port, pytest.raises(Refused, match="--max-size"):
        import_from(registry, f"https://files.example:{port}/a", "a/b", max_bytes=10 << 20, rules=rules)
    assert list((home / "registry/tmp").iterdir()) == []


def test_a_file_that_ends_too_soon_is_no_file(serve: Any, rules: Rules, tmp_path: Path) -> None:
    def short(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        handler.send_response(200)
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        handler.wfile.write(b"x" * 50)

    with serve(short) as port, pytest.raises(Unavailable, match="could not be fetched"):
        fetch(f"https://files.example:{port}/a", tmp_path, rules=rules)


def test_a_server_that_says_nothing_is_given_up(serve: Any, rules: Rules, tmp_path: Path) -> None:
    def silent(handler: BaseHTTPRequestHandler) -> None:
        handler.rfile.read(1)

    with serve(silent) as port, pytest.raises(Unavailable, match="in time"):
        fetch(f"https://files.example:{port}/a", tmp_path, rules=rules)


def test_a_server_that_drips_is_given_up(serve: Any, rules: Rules, tmp_path: Path) -> None:
    with serve(send()) as port, pytest.raises(Unavailable, match="too slowly"):
        fetch(f"https://files.example:{port}/a", tmp_path, rules=replace(rules, most_seconds=0.0))


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (send(status=404), NotFound, "there is no file at"),
        (
            send(status=401),
            Refused,
            r"access to https://files\.example:\d+/a is denied \(status 401\); download it yourself",
        ),
        (send(status=503), Unavailable, "status 503"),
        (send(b"<html>", Content_Type="text/html; charset=utf-8"), Refused, "is a web page, not a file"),
        (send(Content_Encoding="gzip"), Refused, "gzip"),
        (send(b"", 302), Unavailable, "status 302"),
    ],
)
def test_what_is_no_file_is_said(
    serve: Any, rules: Rules, tmp_path: Path, answer: Answer, error: type[ScumbleError], says: str
) -> None:
    with serve(answer) as port, pytest.raises(error, match=says):
        fetch(f"https://files.example:{port}/a", tmp_path, rules=rules)


def test_civitai_without_a_token_says_which(serve: Any, rules: Rules, tmp_path: Path) -> None:
    with serve(send(status=401)) as port, pytest.raises(Refused, match="CIVITAI_TOKEN"):
        fetch(f"https://civitai.com:{port}/api/download/models/1", tmp_path, rules=rules)


@pytest.mark.parametrize("url", ["https://", "https:///a", "https://a:b/c", "https://é.example/", "https://a b/"])
def test_what_is_no_url_is_an_invalid_request(url: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest):
        fetch(url, tmp_path)


def test_a_name_without_an_address_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(addresses.socket, "getaddrinfo", nothing)
    with pytest.raises(NotFound, match="has no address"):
        fetch("https://nowhere.example/a", tmp_path)


def test_tokens_go_to_their_own_host_only() -> None:
    environment = {"CIVITAI_API_TOKEN": "t"}
    assert token_for("civitai.com", environment) == token_for("www.civitai.com", environment) == "t"
    assert token_for("civitai.com.example", environment) is token_for("evilcivitai.com", environment) is None


def test_no_secret_of_a_url_is_shown() -> None:
    url = "https://ann:pass@[::1]:8443/a%20b?token=secret&type=Model&sig=secret#secret"
    assert redacted(url) == "https://[::1]:8443/a%20b?type=Model"


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        (None, "c.pt"),
        ('attachment; filename="ink.safetensors"', "ink.safetensors"),
        ('attachment; filename="../../etc/passwd"', "passwd"),
        (r'attachment; filename="..\\..\\boot.ini"', "boot.ini"),
        ('attachment; filename=".bashrc"', "bashrc"),
        ('attachment; filename="a\x1b[2J.pt"', "a__2J.pt"),
        ("attachment; filename*=UTF-8''%E5%A2%A8.safetensors", "墨.safetensors"),
        ('attachment; filename=""', "c.pt"),
        ('attachment; filename=".."', "download"),
        ("nonsense;;;=", "c.pt"),
    ],
)
def test_a_server_s_name_for_a_file_is_made_safe(disposition: str | None, name: str) -> None:
    assert file_name(disposition, "https://a/b/c.pt?d=/e.pt") == name


@given(st.text())
def test_whatever_a_server_says_is_one_short_printable_name(text: str) -> None:
    name = file_name(f'attachment; filename="{text}"'.replace("\n", " ").replace("\r", " "), "https://a/")
    assert name and name.isprintable() and len(name) <= 150 and not set(name) & set("/\\\0") and name[0] != "."
