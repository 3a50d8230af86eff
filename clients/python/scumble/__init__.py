"""Generate images with a Scumble server, with any mix of adapters per request.

    import scumble

    with scumble.Client("127.0.0.1:8001") as client:
        client.images.generate("a red apple", adapters=["styles/ink:0.8"]).save("apple.png")

Modules are imported on first use, so that code which needs only the errors does not import gRPC.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scumble.client import Client, Health
    from scumble.errors import (
        Cancelled,
        DeadlineExceeded,
        Incompatible,
        IntegrityError,
        InvalidRequest,
        NotFound,
        OutOfMemory,
        QueueFull,
        Refused,
        ScumbleError,
        Unavailable,
    )
    from scumble.events import Done, Event, Failed, Preview, Queued, Step
    from scumble.images import Images
    from scumble.receipt import Receipt
    from scumble.request import Adapter, Options, Request
    from scumble.stats import Stats

__all__ = [
    "Adapter",
    "Cancelled",
    "Client",
    "DeadlineExceeded",
    "Done",
    "Event",
    "Failed",
    "Health",
    "Images",
    "Incompatible",
    "IntegrityError",
    "InvalidRequest",
    "NotFound",
    "Options",
    "OutOfMemory",
    "Preview",
    "QueueFull",
    "Queued",
    "Receipt",
    "Refused",
    "Request",
    "ScumbleError",
    "Stats",
    "Step",
    "Unavailable",
]

_MODULES = {
    "Client": "scumble.client",
    "Health": "scumble.client",
    "Images": "scumble.images",
    "Receipt": "scumble.receipt",
    "Stats": "scumble.stats",
    **dict.fromkeys(("Adapter", "Options", "Request"), "scumble.request"),
    **dict.fromkeys(("Done", "Event", "Failed", "Preview", "Queued", "Step"), "scumble.events"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES.get(name, "scumble.errors")), name)


def __dir__() -> list[str]:
    """List what can be imported, too, so that completion offers it."""
    return sorted({*globals(), *__all__})
