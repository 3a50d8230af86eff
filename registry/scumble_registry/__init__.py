"""The versioned registry of adapters and bases, embedded: `Registry.open(home)`."""

from scumble_registry.catalogue import Status, Version
from scumble_registry.manifest import Manifest
from scumble_registry.paths import default_home
from scumble_registry.references import Reference, parse
from scumble_registry.registry import Registry, Verified

__all__ = ["Manifest", "Reference", "Registry", "Status", "Verified", "Version", "default_home", "parse"]
