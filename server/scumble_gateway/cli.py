"""`scumble gateway`."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Annotated

import typer

from scumble.errors import InvalidRequest

IDLE_SECONDS = 15
MOST_CONNECTIONS = 2000


def gateway(
    grpc: Annotated[
        str, typer.Option(help="gRPC address of the model. [SCUMBLE_URL]", envvar="SCUMBLE_URL")
    ] = "127.0.0.1:8001",
    host: Annotated[str, typer.Option(help="Address to listen on, of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8080,
) -> None:
    """Serve HTTP in front of a model that runs already: our own API, and OpenAI's images API."""
    if not _is_loopback(host):
        raise InvalidRequest(
            f"host {host} is reached from other machines, and the gateway does not ask for tokens yet; listen on "
            "127.0.0.1, behind a proxy that asks",
            field="host",
        )
    import uvicorn

    from scumble_gateway.app import create_app
    from scumble_gateway.protocol import BoundedProtocol
    from scumble_gateway.upstream import Upstream

    uvicorn.run(
        lambda: create_app(Upstream(grpc)),
        factory=True,  # within the loop, to which the channel belongs
        host=host,
        port=port,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        limit_concurrency=MOST_CONNECTIONS,
        http=BoundedProtocol,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
