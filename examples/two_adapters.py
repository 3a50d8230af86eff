"""Draw one prompt with the base, with each of two adapters, and with both: four requests at once, in one batch.

    scumble registry publish demo/base --name scumble/demo
    scumble registry publish demo/adapters/lora/openmoji --name styles/openmoji --base scumble/demo
    scumble registry publish demo/adapters/lora/ink --name styles/ink --base scumble/demo
    scumble serve                                # in another terminal
    python examples/two_adapters.py --out apples

The address of the server is SCUMBLE_URL, else 127.0.0.1:8001.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import scumble


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="a red apple")
    parser.add_argument("--adapters", nargs=2, default=["styles/openmoji", "styles/ink"], metavar="REF")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("two-adapters"))
    arguments = parser.parse_args()
    first, second = arguments.adapters
    sets = {
        "base": [],
        "first": [f"{first}:0.8"],
        "second": [f"{second}:0.8"],
        "both": [scumble.Adapter(ref=first, weight=0.5), scumble.Adapter(ref=second, weight=0.5)],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)

    with scumble.Client() as client, ThreadPoolExecutor(len(sets)) as threads:

        def draw(adapters: list[str] | list[scumble.Adapter]) -> scumble.Images:
            return client.images.generate(arguments.prompt, adapters=adapters, seed=7, steps=arguments.steps)

        for name, images in zip(sets, threads.map(draw, sets.values()), strict=True):
            (file,) = images.save(arguments.out / f"{name}.png")
            used = (
                ", ".join(f"{adapter.ref} at {adapter.weight:g}" for adapter in images.receipt.adapters) or "no adapter"
            )
            print(f"{file}: {used}")


if __name__ == "__main__":
    main()
