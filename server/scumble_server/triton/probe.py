"""Queries a server's model itself, because Triton reports a model as ready whose process is dead."""

from __future__ import annotations

import http.client
import json

from scumble.errors import Unavailable
from scumble.stats import Stats
from scumble.wire import STREAM_MODEL

ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - translated, not bound


def reachable(host: str) -> str:
    """Return an address of a server that was bound to `host`."""
    return ANY_ADDRESS.get(host, host)


def ask_stats(host: str, http_port: int, timeout: float) -> Stats:
    """Fetch the loop's counters over HTTP. Raises Unavailable without a response in `timeout` seconds."""
    connection = http.client.HTTPConnection(reachable(host), http_port, timeout=timeout)
    try:
        connection.request("POST", f"/v2/models/{STREAM_MODEL}/generate", json.dumps({"prompt": "", "query": "stats"}))
        response = connection.getresponse()
        body = response.read()
        if response.status != http.HTTPStatus.OK:
            raise Unavailable(f"the server's model does not answer: {body.decode(errors='replace')}")
        stats = Stats.model_validate_json(json.loads(body)["stats"])
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        raise Unavailable(f"the server does not answer on port {http_port}: {error!r}") from error
    else:
        return stats
    finally:
        connection.close()
