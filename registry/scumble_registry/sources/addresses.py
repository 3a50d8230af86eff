"""Which addresses may be connected to when a URL comes from somebody: public ones.

A name is looked up once, every address that it has is judged, and the connection goes to an address that was judged: a
name that means something else a moment later (DNS rebinding) changes nothing. Names are never judged, only addresses.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterable
from typing import Any

import httpcore2

from scumble.errors import NotFound, Refused

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Rule = Callable[[Address], bool]

_UNICAST = ipaddress.IPv6Network("2000::/3")
"""All that was ever given out; what else calls itself global is old or odd."""
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def is_public(address: Address) -> bool:
    """Not loopback, private, link-local, multicast, reserved or for documentation; nor an IPv6 address that stands for
    an IPv4 address that is.
    """
    if isinstance(address, ipaddress.IPv6Address):
        if (inner := _inner(address)) is not None:
            return is_public(inner)
        if address not in _UNICAST:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def _inner(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that it is a spelling of (mapped, 6to4, Teredo, NAT64)."""
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]


class CheckedNetwork(httpcore2.NetworkBackend):
    """Connects to addresses that `rule` allows and to nothing else."""

    def __init__(self, rule: Rule = is_public) -> None:
        self._rule = rule
        self._sockets = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        """Raises NotFound for a name without addresses, Refused where one of them is not allowed, httpcore's errors."""
        addresses = resolve(host, port)
        for address in addresses:
            if not self._rule(ipaddress.ip_address(address)):
                raise Refused(
                    f"{host} is at {address}, which is no public address; nothing is fetched from inside a network. "
                    "Download the file yourself and publish it",
                    host=host,
                )
        for address in addresses[:-1]:
            try:
                return self._sockets.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                continue
        return self._sockets.connect_tcp(addresses[-1], port, timeout, local_address, socket_options)

    def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore2.NetworkStream:
        raise NotImplementedError


def resolve(host: str, port: int) -> list[str]:
    """All addresses of a name, each once, in the system's order. Raises NotFound."""
    try:
        resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise NotFound(f"the name {host} has no address: {error}; check the URL and the network", host=host) from error
    return list(dict.fromkeys(str(address[0]) for *_, address in resolved))
