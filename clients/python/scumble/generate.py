"""`scumble generate`: one request, written as image files with their receipt inside."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from scumble.client import DEFAULT_URL, Client, wait_for_images
from scumble.errors import InvalidRequest, NotFound
from scumble.files import write_whole
from scumble.images import Images, check_path, encoded
from scumble.local import default_server, local_server
from scumble.progress import ProgressBar
from scumble.receipt import Receipt
from scumble.redraw import find_inputs, input_digests, read_receipt, request_from_receipt
from scumble.request import Adapter, Request, SchedulerName, parse_adapter


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; may be empty.")] = None,
    *,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="File to write (.png, .webp, .jpg); several images become NAME-0.png …")
    ],
    base: Annotated[str | None, typer.Option(help="Base, e.g. ns/name@2.")] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="REF[:WEIGHT]; repeatable.")] = None,
    control: Annotated[list[str] | None, typer.Option(help="ControlNet: REF=IMAGE[:WEIGHT]; repeatable.")] = None,
    ip: Annotated[list[str] | None, typer.Option(help="IP-Adapter: REF=IMAGE[:WEIGHT]; repeatable.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="With --from-receipt: its input images, files or folders.")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="Negative prompt.")] = None,
    seed: Annotated[int | None, typer.Option(help="Random if not given; the receipt has it.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 or less: none.")] = None,
    size: Annotated[str | None, typer.Option(help="WxH in pixels, e.g. 128x128.")] = None,
    scheduler: Annotated[str | None, typer.Option(help=f"One of {', '.join(get_args(SchedulerName))}.")] = None,
    timestep_spacing: Annotated[str | None, typer.Option(help="leading, trailing or linspace.")] = None,
    rescale_betas: Annotated[
        bool | None, typer.Option("--rescale-betas/--no-rescale-betas", help="Let the last timestep have no signal.")
    ] = None,
    eta: Annotated[float | None, typer.Option(help="Noise that ddim and tcd add in each step, 0 to 1.")] = None,
    init: Annotated[Path | None, typer.Option(help="Input image (img2img).")] = None,
    mask: Annotated[
        Path | None, typer.Option(help="With --init: only the white area of this image changes (inpainting).")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, an option of the request, e.g. strength=0.5; repeatable.")
    ] = None,
    num_images: Annotated[int | None, typer.Option("-n", help="Number of images; seeds count up.")] = None,
    receipt: Annotated[Path | None, typer.Option(help="Also write the receipt, as JSON.")] = None,
    from_receipt: Annotated[Path | None, typer.Option(help="Repeat the request in this image or receipt.")] = None,
    url: Annotated[str | None, typer.Option(help="gRPC address of a server. [SCUMBLE_URL]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print files and receipt as JSON.")] = False,
) -> None:
    """Generate images. Without --url or SCUMBLE_URL the server at the default port is used; without one, a server is
    started for the request and stopped afterwards.
    """
    named = {name: path for name, path in (("init", init), ("mask", mask)) if path is not None}
    images, image_adapters = parse_image_adapters([*(control or ()), *(ip or ())])
    images |= {name: encoded(path) for name, path in named.items()}
    options = {
        **parse_options(option or []),
        **_without_none(timestep_spacing=timestep_spacing, rescale_betas=rescale_betas, eta=eta),
        **{option: name for name, option in (("init", "image"), ("mask", "mask")) if name in named},
    }
    given = _without_none(
        prompt=prompt,
        base=base,
        adapters=[*(parse_adapter(text) for text in adapter or ()), *image_adapters] or None,
        images=images or None,
        negative_prompt=negative,
        seed=seed,
        steps=steps,
        guidance_scale=guidance,
        scheduler=scheduler,
        num_images=num_images,
        options=options or None,
        **(_parse_size(size) if size else {}),
    )
    request = _from_receipt(given, from_receipt, image or []) if from_receipt else _request(given)
    _check_folders(out, receipt)
    drawn = _draw(request, url or os.environ.get("SCUMBLE_URL"), quiet=as_json)
    _report(drawn, out, receipt, as_json=as_json)


def notices(receipt: Receipt) -> list[str]:
    """Return a line for each adapter of the request that was dropped."""
    return [f"adapter {dropped.ref} was dropped: {dropped.reason}" for dropped in receipt.dropped]


def _without_none(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _check_folders(out: Path, receipt: Path | None) -> None:
    """Check the output folders before any work. Raises InvalidRequest or NotFound."""
    check_path(out)
    if receipt and not receipt.parent.is_dir():
        raise NotFound(f"folder {receipt.parent} does not exist; make it first", path=str(receipt.parent))


def _report(drawn: Images, out: Path, receipt: Path | None, *, as_json: bool) -> None:
    """Write the files and print their names."""
    files = [str(path) for path in drawn.save(out)]
    plain = drawn.receipt.to_json()
    if receipt:
        write_whole(receipt, json.dumps(plain, indent=2).encode())
    print(json.dumps({"files": files, "receipt": plain}) if as_json else "\n".join(files))
    for notice in notices(drawn.receipt):
        print(f"scumble: {notice}", file=sys.stderr)


def _request(given: dict[str, Any]) -> Request:
    if "prompt" not in given:
        raise InvalidRequest('give a prompt (it may be "") or --from-receipt FILE', field="prompt")
    return Request.parse(given)


def _from_receipt(given: dict[str, Any], file: Path, paths: list[Path]) -> Request:
    if given:
        raise InvalidRequest(
            f"--from-receipt repeats a request as it was: leave {', '.join(sorted(given))} out", field="from_receipt"
        )
    receipt = read_receipt(file)
    return request_from_receipt(receipt, find_inputs(input_digests(receipt), [*paths, file.parent]))


def parse_image_adapters(texts: list[str]) -> tuple[dict[str, bytes], list[Adapter]]:
    """Parse `REF=IMAGE[:WEIGHT]` of the command line into images by their paths, and the adapters that read them.

    Raises InvalidRequest, or NotFound for an image that cannot be read.
    """
    images: dict[str, bytes] = {}
    adapters = []
    for text in texts:
        ref, equals, rest = text.partition("=")
        if not equals or not rest:
            raise InvalidRequest(
                f"{text!r} names no image; write REF=IMAGE or REF=IMAGE:WEIGHT", field="adapters.images"
            )
        path, weight = _split_weight(rest)
        images[path] = encoded(path)
        adapters.append(Adapter(ref=ref, images=(path,), weight=weight))
    return images, adapters


def parse_options(texts: list[str]) -> dict[str, Any]:
    """Parse `NAME=VALUE` of the command line; a VALUE that is not JSON is a string. Raises InvalidRequest.

    >>> parse_options(["strength=0.5", "format=webp"])
    {'strength': 0.5, 'format': 'webp'}
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InvalidRequest(f"{text!r}: write NAME=VALUE, e.g. strength=0.5", field="options")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def _split_weight(text: str) -> tuple[str, float]:
    """Split IMAGE[:WEIGHT]. A path may have colons itself: only a number after the last one is a weight."""
    path, _, weight = text.rpartition(":")
    try:
        value = float(weight)
    except ValueError:
        return text, 1.0
    if not path or not math.isfinite(value):
        raise InvalidRequest(f"{text!r}: write IMAGE:WEIGHT with a finite number", field="adapters.weight")
    return path, value


def _parse_size(size: str) -> dict[str, int]:
    width, times, height = size.lower().partition("x")
    if not (times and width.isascii() and width.isdigit() and height.isascii() and height.isdigit()):
        raise InvalidRequest(f"size {size!r}: write WIDTHxHEIGHT in pixels, e.g. 128x128", field="size")
    return {"width": int(width), "height": int(height)}


def _draw(request: Request, url: str | None, *, quiet: bool) -> Images:
    with ProgressBar(quiet=quiet) as bar, _server(url, request.base, bar) as address, Client(address) as client:
        return wait_for_images(client.images.stream(request), bar.show)


@contextmanager
def _server(url: str | None, base: str | None, bar: ProgressBar) -> Iterator[str]:
    """Yield `url`, or the default address if a server is ready there, or that of a server that runs until the end of
    the `with`.
    """
    address = url or default_server()
    if address is not None:
        yield address
        return
    bar.tell(
        f"scumble: no server is ready at {DEFAULT_URL}; starting one for this request alone, which takes most of the "
        "time. To avoid the wait, run `scumble serve` in another terminal."
    )
    bar.say("starting a server")
    with local_server(base) as address:
        bar.say("sent")
        yield address
