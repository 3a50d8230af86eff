"""The errors as one tree. Each has a stable code for programs and a message for people.

    ScumbleError
    ├── InvalidRequest   2  a field is missing, malformed or out of range      code invalid_request
    ├── NotFound         3  no such adapter, version, alias, base or file      code not_found
    ├── Refused          4  it exists but may not be used in this way          code refused
    │   └── Incompatible 4  the adapter does not fit the base                  code incompatible
    ├── IntegrityError   5  stored bytes do not match their digest             code integrity
    └── Unavailable      6  the server or something it needs is missing        code unavailable
        ├── QueueFull    6  try again after `retry_after` seconds              code queue_full
        ├── Cancelled    6  the caller cancelled the request                   code cancelled
        ├── DeadlineExceeded 6  it was not finished by its deadline            code deadline_exceeded
        └── OutOfMemory  6  the request does not fit the device even alone     code out_of_memory

The number is the exit status of the `scumble` command.
"""

from __future__ import annotations

from typing import Any, ClassVar


class ScumbleError(Exception):
    """Base of all errors. `fields` are for programs, beside the message."""

    code: ClassVar[str] = "internal"
    exit_status: ClassVar[int] = 1

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields

    def to_dict(self) -> dict[str, Any]:
        return {
            "code": self.code,
            "message": self.message,
            **({"fields": self.fields} if self.fields else {}),
        }


class InvalidRequest(ScumbleError):
    """A field is missing, malformed or out of range; `fields["field"]` names it."""

    code = "invalid_request"
    exit_status = 2


class NotFound(ScumbleError):
    code = "not_found"
    exit_status = 3


class Refused(ScumbleError):
    code = "refused"
    exit_status = 4


class Incompatible(Refused):
    code = "incompatible"


class IntegrityError(ScumbleError):
    code = "integrity"
    exit_status = 5


class Unavailable(ScumbleError):
    code = "unavailable"
    exit_status = 6


class QueueFull(Unavailable):
    """The queue is full; `fields["retry_after"]` is in seconds."""

    code = "queue_full"


class Cancelled(Unavailable):
    code = "cancelled"


class DeadlineExceeded(Unavailable):
    code = "deadline_exceeded"


class OutOfMemory(Unavailable):
    """The device has too little memory for the request; a smaller size, fewer images or adapters need less."""

    code = "out_of_memory"


_BY_CODE: dict[str, type[ScumbleError]] = {
    kind.code: kind
    for kind in (
        ScumbleError,
        InvalidRequest,
        NotFound,
        Refused,
        Incompatible,
        IntegrityError,
        Unavailable,
        QueueFull,
        Cancelled,
        DeadlineExceeded,
        OutOfMemory,
    )
}


def from_dict(data: dict[str, Any]) -> ScumbleError:
    """Make an error from the result of `ScumbleError.to_dict`; an unknown code gives a plain ScumbleError."""
    kind = _BY_CODE.get(str(data.get("code")), ScumbleError)
    return kind(str(data.get("message", "")), **data.get("fields", {}))
