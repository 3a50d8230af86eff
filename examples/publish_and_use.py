"""Publish an adapter's file, and draw with exactly that version, without a restart of the server.

    python examples/publish_and_use.py demo/adapters/lora/ink --name styles/ink --base scumble/demo

The registry is the one that the server reads: SCUMBLE_HOME, else ~/.scumble. The address of the server is SCUMBLE_URL,
else 127.0.0.1:8001. The same file again is the same version.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import scumble
from scumble_registry import Registry, default_home


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the adapter: a file, or a folder in diffusers' layout")
    parser.add_argument("--name", required=True, help="ns/name to publish as")
    parser.add_argument("--base", required=True, help="the base that it is for")
    parser.add_argument("--prompt", default="a red apple, ink style")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("published.png"))
    arguments = parser.parse_args()

    with Registry.open(default_home(), create=True) as registry:
        version = registry.publish(arguments.file, arguments.name, base=arguments.base)
    print(f"published {version.ref}, a {version.manifest.kind} ({version.digest})")

    with scumble.Client() as client:
        images = client.images.generate(
            arguments.prompt, base=arguments.base, adapters=[f"{version.ref}:0.9"], seed=7, steps=arguments.steps
        )
    (bound,) = images.receipt.adapters
    assert bound.digest == version.digest, "the receipt names what was used by its content"
    (file,) = images.save(arguments.out)
    print(f"{file}: drawn with {bound.ref}")


if __name__ == "__main__":
    main()
