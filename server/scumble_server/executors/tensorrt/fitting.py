"""Finds the engines in the registry that fit this machine, code and precision."""

from __future__ import annotations

import logging

from scumble.errors import NotFound, Refused, Unavailable
from scumble_build.engines import store
from scumble_build.engines.api import Flavour, load
from scumble_build.engines.builder import current_sm
from scumble_build.engines.key import Machine
from scumble_build.engines.store import Pulled
from scumble_build.export.manifest import Precision
from scumble_build.export.provenance import code_digest
from scumble_registry import Registry, Version
from scumble_server.config import ServerConfig

log = logging.getLogger(__name__)


def pull_fitting(registry: Registry, version: Version, machine: Machine, precision: Precision) -> dict[str, Pulled]:
    """Return a version's engines that fit this machine and were exported by this code, by graph. Others are logged.

    Raises IntegrityError.
    """
    pulled: dict[str, Pulled] = {}
    for name, stored in store.fitting(store.listed(registry, version), machine, version.digest, precision).items():
        engine = store.pull(registry, stored)
        try:
            store.check_current(engine, code_digest())
        except Refused as error:
            log.warning("%s", error)
        else:
            pulled[name] = engine
    return pulled


def engine_bytes(registry: Registry, version: Version, config: ServerConfig) -> int:
    """Return the size of a version's engines that fit this machine; 0 if there are none, or TensorRT is not here."""
    sm = current_sm()
    if sm is None:
        return 0
    try:
        flavour = Flavour(config.executor)
        machine = Machine(flavour, load(flavour).__version__, sm)
    except Unavailable:
        return 0
    fitting = store.fitting(store.listed(registry, version), machine, version.digest, config.precision)
    return sum(engine.artifact.size for engine in fitting.values())


def pull_base(registry: Registry, version: Version, machine: Machine, config: ServerConfig) -> dict[str, Pulled]:
    """Return a base's engines. If there are none and `config.build_engines` is set, build them now.

    Raises NotFound, IntegrityError, and as a build does.
    """
    pulled = pull_fitting(registry, version, machine, config.precision)
    if not pulled and config.build_engines:
        _build(version, machine, config)
        pulled = pull_fitting(registry, version, machine, config.precision)
    if not pulled:
        raise NotFound(
            f"{version.ref} has no engine for {machine.flavour} {machine.version} on SM{machine.sm} in "
            f"{config.precision}; run `scumble build engine --base {version.ref} --flavour {machine.flavour} "
            f"--precision {config.precision}`"
        )
    return pulled


def _build(version: Version, machine: Machine, config: ServerConfig) -> None:
    from scumble_build.engines.command import build_into

    log.warning("%s has no engine that fits; building them now, which takes minutes to hours", version.ref)
    build_into(version.ref, config.home, machine.flavour, (machine.sm,), config.precision)
