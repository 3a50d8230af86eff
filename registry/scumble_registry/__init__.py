"""The versioned registry of adapters and bases, embedded: `Registry.open(home)`.

registry.py         the one object: publish, resolve, materialise, verify, collect
references.py, manifest.py, blob.py, hashes.py    names and descriptions of versions
compatibility/      which adapter fits which base: one module per kind, names and shapes of targets
formats/            from published files to records and back: one module per kind
store/              blobs, database, cache, leases
publishing.py, inspection.py, importing.py, exporting.py, extract.py, checking.py    operations on versions
sources/            the Hub and the web
cli/                `scumble registry …`
"""

from scumble_registry.manifest import Manifest
from scumble_registry.references import Reference, parse
from scumble_registry.registry import Registry, Verified
from scumble_registry.store.catalogue import Status, Version
from scumble_registry.store.paths import default_home

__all__ = ["Manifest", "Reference", "Registry", "Status", "Verified", "Version", "default_home", "parse"]
