"""Show a request's progress: its place in the queue, its steps, rough previews, and the image.

    python examples/stream_previews.py --out apple

The address of the server is SCUMBLE_URL, else 127.0.0.1:8001. Leaving the loop early would cancel the request.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

import scumble

ENLARGED = 8  # a preview has one pixel for 8x8 of the image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="a red apple")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--every", type=int, default=6, help="steps from one preview to the next")
    parser.add_argument("--out", type=Path, default=Path("stream"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    options = scumble.Options(preview_every=arguments.every)
    with scumble.Client() as client:
        for event in client.images.stream(arguments.prompt, seed=7, steps=arguments.steps, options=options):
            match event:
                case scumble.Queued(position):
                    print(f"queued, {position} ahead")
                case scumble.Step(step, steps):
                    print(f"step {step} of {steps}")
                case scumble.Preview(step, _, pixels):
                    small = Image.fromarray(pixels[0])
                    size = (small.width * ENLARGED, small.height * ENLARGED)
                    file = arguments.out / f"preview-{step:03}.png"
                    small.resize(size, Image.Resampling.BICUBIC).save(file)
                    print(f"preview: {file}")
                case scumble.Done(images, receipt):
                    file = arguments.out / "image.png"
                    scumble.Images(images, receipt).save(file)
                    print(f"done: {file}")


if __name__ == "__main__":
    main()
