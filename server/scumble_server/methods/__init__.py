"""One module per adapter method: a normalised record becomes what a row carries. A new one is a name in METHODS."""

from __future__ import annotations

from scumble_server.methods import controlnet, dreambooth, hypernetwork, ip_adapter, lora, textual_inversion
from scumble_server.methods.method import Method

METHODS: dict[str, Method] = {
    method.KIND: method for method in (lora, textual_inversion, ip_adapter, controlnet, hypernetwork, dreambooth)
}
"""By the kind that the registry gives."""

__all__ = ["METHODS", "Method"]
