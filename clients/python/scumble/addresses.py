"""Hosts and ports of this machine."""

from __future__ import annotations

import errno
import socket
from ipaddress import ip_address

from scumble.errors import Unavailable


def is_loopback(host: str) -> bool:
    """Return whether nothing but this machine reaches a host, a name or an address."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host: str, purpose: str, port: int) -> socket.socket:
    """Bind a port, 0: any free one. Raises Unavailable that names the option `--PURPOSE-port`."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        why = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        raise Unavailable(
            f"{purpose} port {port} of {host} {why}; choose another with --{purpose}-port (0: any free one)",
            port=port,
            host=host,
        ) from error
    return bound
