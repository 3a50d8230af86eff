"""Restrict connections to public addresses, for URLs from untrusted sources.

A name is resolved once, all its addresses are checked, and the connection goes to a checked address, so a name that
resolves to another address a moment later (DNS rebinding) has no effect. Only addresses are checked, never names.
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
"""All assigned global unicast addresses; other addresses that `ipaddress` calls global are obsolete or special."""
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def is_public(address: Address) -> bool:
    """Return whether an address is not loopback, private, link-local, multicast, reserved or for documentation.

    For an IPv6 address that embeds an IPv4 address, the IPv4 address decides.
    """
    if isinstance(address, ipaddress.IPv6Address):
        if (embedded := _embedded(address)) is not None:
            return is_public(embedded)
        if address not in _UNICAST:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def _embedded(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address that it embeds (mapped, 6to4, Teredo, NAT64), if any."""
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]


class CheckedNetwork(httpcore2.NetworkBackend):
    """A network backend that connects only to addresses that `rule` allows."""

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
        """Connect to one of the host's addresses.

        Raises NotFound for a name without addresses, Refused if one of them is not allowed, and httpcore's errors.
        """
        addresses = resolve(host, port)
        for address in addresses:
            if not self._rule(ipaddress.ip_address(address)):
                raise Refused(
                    f"{host} is at {address}, which is no public address; only public addresses are allowed. "
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
    """Return all addresses of a name, each once, in the system's order. Raises NotFound."""
    try:
        resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise NotFound(f"the name {host} has no address: {error}; check the URL and the network", host=host) from error
    return list(dict.fromkeys(str(address[0]) for *_, address in resolved))
