"""The projections of an image into tokens, recognised by their keys: `image_proj.*` without that prefix.

X is the width of the tokens, T their number for one image, E the width of the projection's input.

| kind             | has                                     | T              | reads                                |
|------------------|-----------------------------------------|----------------|--------------------------------------|
| `base`           | `proj.weight` (T·X, E), `norm`          | 4 as a rule    | the encoder's embedding              |
| `full`           | `proj.{0,2}`, the norm is `proj.3`      | the encoder's  | its penultimate hidden states        |
| `plus`           | `latents` (1, T, D), a resampler        | 16 as a rule   | likewise                             |
| `faceid`         | `proj.{0,2}` (T·X, …), `norm`           | 4; Portrait 16 | an embedding of a face               |
| `faceid_plus`    | the same, and `perceiver_resampler.*`   | 4              | such an embedding, and the states    |
| `face_resampler` | `plus` with an input of width 512       | 16             | an embedding of a face (InstantID)   |

A width of 512 is ArcFace's and no image encoder's, which distinguishes InstantID's file from a `plus`.

(Ye et al., IP-Adapter, 2308.06721, and its repository's later models.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from scumble.errors import Refused
from scumble_registry.compatibility import IpAdapterKind, Shape
from scumble_registry.formats.unknown_keys import refuse_unknown_keys

_ARCFACE = 512
_HEAD = 64  # channels of one head of a resampler: fixed in all of them


@dataclass(frozen=True, slots=True)
class Projection:
    """What the shapes of a projection determine."""

    kind: IpAdapterKind
    tokens: int | None
    """Number of tokens for one image; None: as many as the image encoder has positions."""
    context: int
    """X, the width of the tokens."""
    picture_width: int | None
    """Width of the image encoder's embedding for `base`, else of its hidden states; None: it reads no image."""
    embedding_width: int | None
    """Width of the embedding that the caller sends (of a face recogniser), or None."""


def inspect(shapes: Mapping[str, Shape]) -> Projection:
    """Recognise a projection. Raises Refused, naming a tensor that is missing, unknown or of the wrong shape."""
    given = _Given(shapes)
    if "proj.weight" in shapes:
        return _base(given)
    if "proj.3.weight" in shapes:
        return _full(given)
    if "latents" in shapes:
        return _plus(given)
    if "perceiver_resampler.proj_in.weight" in shapes:
        return _faceid_plus(given)
    if "proj.0.weight" in shapes:
        return _faceid(given)
    raise Refused(f"image_proj is of no known kind of IP-Adapter: it has {', '.join(sorted(shapes)[:8]) or 'nothing'}")


class _Given:
    """The shapes of a file's tensors. Each is checked as it is taken; `done` refuses those that were not taken."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self._shapes = shapes
        self._used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def matrix(self, name: str) -> tuple[int, int]:
        rows, columns = self.take(name, 2)
        return rows, columns

    def take(self, name: str, dimensions: int) -> Shape:
        shape = self._shapes.get(name)
        if shape is None:
            raise Refused(f"the IP-Adapter lacks image_proj.{name}; the file is incomplete", tensor=name)
        if len(shape) != dimensions or 0 in shape:
            raise Refused(f"image_proj.{name} has shape {shape}, not {dimensions} dimensions", tensor=name)
        self._used.add(name)
        return shape

    def expect(self, name: str, *shape: int) -> None:
        if self.take(name, len(shape)) != shape:
            raise Refused(f"image_proj.{name} has shape {self._shapes[name]}, {shape} would fit the others")

    def vectors(self, name: str, width: int) -> None:
        """Take weight and bias of a norm. Raises Refused."""
        self.expect(f"{name}.weight", width)
        self.expect(f"{name}.bias", width)

    def linear(self, name: str) -> tuple[int, int]:
        """Take a layer with a bias and return (out, in). Raises Refused."""
        out, into = self.matrix(f"{name}.weight")
        self.expect(f"{name}.bias", out)
        return out, into

    def done(self) -> None:
        refuse_unknown_keys(
            {f"image_proj.{name}" for name in self._shapes.keys() - self._used}, hint="or of another kind of projection"
        )


def _base(given: _Given) -> Projection:
    out, width = given.linear("proj")
    (context,) = given.take("norm.weight", 1)
    given.vectors("norm", context)
    given.done()
    return Projection("base", _divide(out, context, "proj.weight"), context, width, None)


def _full(given: _Given) -> Projection:
    _, width = given.linear("proj.0")
    given.expect("proj.0.weight", width, width)
    context, _ = given.linear("proj.2")
    given.expect("proj.2.weight", context, width)
    given.vectors("proj.3", context)
    given.done()
    return Projection("full", None, context, width, None)


def _plus(given: _Given) -> Projection:
    one, tokens, inner = given.take("latents", 3)
    given.expect("latents", 1, tokens, inner)
    context, width = _resampler(given, "", inner)
    given.done()
    if width == _ARCFACE:
        return Projection("face_resampler", one * tokens, context, None, width)
    return Projection("plus", one * tokens, context, width, None)


def _faceid(given: _Given) -> Projection:
    tokens, context, width = _face(given)
    given.done()
    return Projection("faceid", tokens, context, None, width)


def _faceid_plus(given: _Given) -> Projection:
    tokens, inner, width = _face(given)
    context, picture_width = _resampler(given, "perceiver_resampler.", inner)
    given.done()
    if context != inner:
        raise Refused(
            f"the resampler's latents have width {inner} and its output {context}; in a FaceID-Plus both are equal"
        )
    return Projection("faceid_plus", tokens, context, picture_width, width)


def _face(given: _Given) -> tuple[int, int, int]:
    """Return the number of tokens, their width and the embedding's. Raises Refused."""
    (context,) = given.take("norm.weight", 1)
    given.vectors("norm", context)
    inner, width = given.linear("proj.0")
    out, _ = given.linear("proj.2")
    given.expect("proj.2.weight", out, inner)
    return _divide(out, context, "proj.2.weight"), context, width


def _resampler(given: _Given, prefix: str, inner: int) -> tuple[int, int]:
    """Return the widths of its output and its input; `inner` is the width of its latents. Raises Refused."""
    into, width = given.linear(f"{prefix}proj_in")
    context, out = given.linear(f"{prefix}proj_out")
    given.vectors(f"{prefix}norm_out", context)
    if not inner == into == out:
        raise Refused(
            f"the resampler's proj_in gives {into} and its proj_out reads {out}, but its latents have width {inner}"
        )
    depth = 0
    while f"{prefix}layers.{depth}.0.to_q.weight" in given:
        _layer(given, f"{prefix}layers.{depth}.", inner)
        depth += 1
    if depth == 0:
        raise Refused("the resampler has no layers; the file is incomplete")
    return context, width


def _layer(given: _Given, prefix: str, inner: int) -> None:
    """Check attention, then a feed-forward network, of linear layers without bias. Raises Refused."""
    given.vectors(f"{prefix}0.norm1", inner)
    given.vectors(f"{prefix}0.norm2", inner)
    heads, _ = given.matrix(f"{prefix}0.to_q.weight")
    _divide(heads, _HEAD, f"{prefix}0.to_q.weight")
    given.expect(f"{prefix}0.to_q.weight", heads, inner)
    given.expect(f"{prefix}0.to_kv.weight", 2 * heads, inner)
    given.expect(f"{prefix}0.to_out.weight", inner, heads)
    given.vectors(f"{prefix}1.0", inner)
    wide, _ = given.matrix(f"{prefix}1.1.weight")
    given.expect(f"{prefix}1.1.weight", wide, inner)
    given.expect(f"{prefix}1.3.weight", inner, wide)


def _divide(size: int, part: int, name: str) -> int:
    if size % part:
        raise Refused(f"image_proj.{name} gives {size} values, which is no multiple of {part}")
    return size // part
