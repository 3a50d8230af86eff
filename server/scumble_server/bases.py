"""All bases that a server is started with: each that can be loaded is served, whatever becomes of the others."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from scumble.errors import Refused, ScumbleError
from scumble_registry import Registry
from scumble_server.base import Base, load_base
from scumble_server.config import ServerConfig
from scumble_server.memory.residency import Residency

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FailedBase:
    """A base that could not be loaded when the server started."""

    ref: str
    """The version's; where the registry has none, what the server was started with."""
    digest: str | None
    """None where the registry has no such version."""
    error: ScumbleError

    def refused(self) -> Refused:
        """Make the error of a request for it."""
        return Refused(
            f"{self.ref} could not be loaded when this server started: {self.error.message}; name another base, or "
            "mend this one and start the server again",
            base=self.ref,
            reason=self.error.code,
        )


def load_bases(registry: Registry, config: ServerConfig, weights: Residency) -> list[Base | FailedBase]:
    """Load the configuration's bases, in its order. Raises the first error if none can be loaded."""
    bases = [_load(registry, ref, config, weights) for ref in (config.base, *config.more_bases)]
    failed = [base for base in bases if isinstance(base, FailedBase)]
    if len(failed) == len(bases):
        raise failed[0].error
    return bases


def _load(registry: Registry, ref: str, config: ServerConfig, weights: Residency) -> Base | FailedBase:
    try:
        return load_base(registry, ref, config, weights)
    except Exception as error:
        log.exception("the base %s is not served, because it cannot be loaded", ref)
        typed = error if isinstance(error, ScumbleError) else ScumbleError(f"{type(error).__name__}: {error}")
        try:
            version = registry.resolve(ref)
        except ScumbleError:
            return FailedBase(ref, None, typed)
        return FailedBase(version.ref, version.digest, typed)
