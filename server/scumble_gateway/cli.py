"""`scumble gateway`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from scumble.addresses import is_loopback
from scumble.errors import InvalidRequest


def gateway(
    grpc: Annotated[
        str, typer.Option(help="gRPC address of the model. [SCUMBLE_URL]", envvar="SCUMBLE_URL")
    ] = "127.0.0.1:8001",
    host: Annotated[str, typer.Option(help="Address to listen on, of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "--gateway-port", min=0, max=65535, help="0: any free one.")] = 8080,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON once it listens.")] = False,
) -> None:
    """Serve HTTP in front of a model that runs already: our own API, and OpenAI's images API."""
    if not is_loopback(host):
        raise InvalidRequest(
            f"host {host} is reached from other machines, and the gateway does not ask for tokens yet; listen on "
            "127.0.0.1, behind a proxy that asks",
            field="host",
        )
    from scumble_gateway.running import listen, server_of, url_of

    bound = listen(host, port)
    address = url_of(bound)
    print(
        json.dumps({"gateway": address}) if as_json else f"The gateway listens at {address}. Ctrl-C stops it.",
        flush=True,
    )
    server_of(grpc).run(sockets=[bound])
