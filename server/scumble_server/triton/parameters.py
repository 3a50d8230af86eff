"""The parameters of a Triton request: what Triton and its front ends add, and what a caller put there by mistake.

Over HTTP's `generate`, whatever is no input of the model arrives here.
"""

from __future__ import annotations

from collections.abc import Mapping

from scumble.request import check_field_names

CALL = "scumble_call"
CANCEL = "scumble_cancel"
"""Of calls between our own two models: see `callers`."""
GRPC_FORWARDS, HTTP_FORWARDS = "user-agent", "Inference-Header-Content-Length"
"""Headers that Triton hands to the model: every gRPC call has one, an HTTP call with binary tensors the other."""
_TRITONS_OWN = frozenset(
    {
        "sequence_id", "sequence_start", "sequence_end", "priority", "timeout",
        "binary_data_output", "triton_enable_empty_final_response",
    }
)  # fmt: skip
_HEADERS = frozenset({GRPC_FORWARDS, HTTP_FORWARDS.lower()})


def check(parameters: Mapping[str, object]) -> None:
    """Raises InvalidRequest for a parameter that nobody reads, with the right field's name."""
    known = {CALL, CANCEL, *_TRITONS_OWN}
    check_field_names(name for name in parameters if name not in known and name.lower() not in _HEADERS)


def wants_text(parameters: Mapping[str, object]) -> bool:
    """Tell whether the response goes into JSON, which has no bytes."""
    return CALL not in parameters and not any(name.lower() in _HEADERS for name in parameters)
