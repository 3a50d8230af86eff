"""A step's record padded to few sizes, so that few CUDA graphs serve every batch.

    rows             to `ROWS`; what is computed for those that are added is cut off
    rows of factors  all; those without read page 0, which is zeros, at a scale of 0
    sets of pages    one that all rows share, or one for each row
    rank pages       to `PAGES`
    tokens           to `CHUNKS` of a prompt; more than one are masked
    pictures         for all rows; groups and tokens to powers of two; a scale of 0 for what is added
    networks         on self-attention and LLLites: the rows that they act on to `ROWS`, the last one again

These are the widest steps at which simulated traffic (`tests/support/traffic.py`) captures in 0.5 % of its steps or
less: finer ones cost fewer rows and more captures.

So a padded step equals the given one, but for the rounding of products of other sizes. No row computes with what
another request brings, not even at a scale of 0: an overflow times 0 is NaN.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from scumble_build.graphs.adapted import Factors, Pages
from scumble_build.graphs.inputs import ContextInputs, ImageInputs, LiteInputs, NetInputs, StepInputs
from scumble_build.graphs.layout import PAGE

ROWS = (1, 2, 4, 8, 12, 16, 24, 32)
PAGES = (2, 4, 16, 32)
"""Ranks of 16, 32, 128 and 256."""
CHUNKS = (1, 3, 6, 12, 24)
"""More than the last one of these lists are padded to a multiple of that."""
TEXT = 77
"""Tokens of one chunk of a prompt."""
PICTURE = 16
"""Tokens of an IP-Adapter: 4 or 16, as a rule."""


@dataclass(frozen=True, slots=True)
class Step:
    """The arguments of one call of the denoiser: sample `(rows, C, h, w)`, timestep `(rows,)`."""

    sample: Tensor
    timestep: Tensor
    inputs: StepInputs


@dataclass(frozen=True, slots=True)
class _Made:
    """A tensor, and what it was made of."""

    sources: Sequence[weakref.ref[Tensor]]
    size: Hashable
    tensor: Tensor


class Padding:
    """Pads steps. An input that is the same tensor as in the last step is padded to the same tensor again, which
    `Buffers` does not copy again. Used by one thread.
    """

    def __init__(self) -> None:
        self._made: dict[str, _Made] = {}

    def __call__(self, step: Step) -> Step:
        """Return the padded step. Its first rows are those of `step`."""
        given, inputs = len(step.sample), step.inputs
        rows = bucket(given, ROWS)
        kv, mask = self._text(inputs.kv, inputs.kv_mask, rows)
        factors, images, features = inputs.factors, inputs.images, inputs.features
        padded = StepInputs(
            kv,
            mask,
            self._factors(factors, given, rows) if factors is not None else None,
            self._images(images, rows) if images is not None else None,
            tuple(_grown(residual, rows) for residual in inputs.residuals) if inputs.residuals is not None else None,
            tuple(self._grown(f"features.{index}", feature, rows) for index, feature in enumerate(features))
            if features is not None
            else None,
            tuple(self._context(f"contexts.{index}", context) for index, context in enumerate(inputs.contexts)),
            tuple(self._lite(f"lites.{index}", lite) for index, lite in enumerate(inputs.lites)),
            self._grown("pooled", inputs.pooled, rows) if inputs.pooled is not None else None,
            self._grown("sizes", inputs.sizes, rows) if inputs.sizes is not None else None,
        )
        return Step(_grown(step.sample, rows), _grown(step.timestep, rows), padded)

    def of_net(self, sample: Tensor, timestep: Tensor, inputs: NetInputs) -> tuple[Tensor, Tensor, NetInputs]:
        """Return the padded arguments of a ControlNet, likewise."""
        rows = bucket(len(sample), ROWS)
        kv, mask = self._text(inputs.kv, inputs.kv_mask, rows)
        added = self._grown("added", inputs.added, rows) if inputs.added is not None else None
        padded = NetInputs(kv, self._grown("hint", inputs.hint, rows), added, mask)
        return _grown(sample, rows), _grown(timestep, rows), padded

    def _text(self, kv: Tensor, mask: Tensor | None, rows: int) -> tuple[Tensor, Tensor | None]:
        given, length = kv.shape[:2]
        tokens = TEXT * bucket(-(-length // TEXT), CHUNKS)
        padded = self._grown("kv", kv, rows, tokens)
        if mask is None and length == tokens == TEXT:
            return padded, None

        def masked() -> Tensor:
            seen = kv.new_ones(given, length, dtype=torch.bool) if mask is None else mask
            return _grown(_grown(seen, given, tokens), rows, value=True)  # a softmax over nothing would be NaN

        return padded, self._once("kv_mask", (rows, tokens), masked, kv if mask is None else mask)

    def _factors(self, factors: Factors, given: int, rows: int) -> Factors:
        pages = bucket(factors.scale.shape[1] // PAGE, PAGES)
        shared = factors.rows_per_set == factors.rows == given
        rest, out, into = factors.rest, factors.stretch_out, factors.stretch_in
        return Factors(
            self._pages("small", factors.small, rows, pages, shared=shared),
            self._pages("rest", rest, rows, pages, shared=shared) if rest is not None else None,
            self._grown("scale", factors.scale, rows, PAGE * pages),
            rows_per_set=rows if shared else 0,
            stretch_out=self._grown("stretch_out", out, rows) if out is not None else None,
            stretch_in=self._grown("stretch_in", into, rows) if into is not None else None,
        )

    def _pages(self, name: str, of: Pages, rows: int, pages: int, *, shared: bool) -> Pages:
        if not shared or len(of.table) == rows:
            return replace(of, table=self._grown(name, of.table, rows, pages))
        repeated = lambda: _grown(of.table[:1], 1, pages).repeat(rows, 1)  # noqa: E731
        return replace(of, table=self._once(name, ("shared", rows, pages), repeated, of.table))

    def _images(self, images: ImageInputs, rows: int) -> ImageInputs:
        given, groups, tokens = images.kv.shape[:3]
        more, length = _power_of_two(groups), max(PICTURE, _power_of_two(tokens))
        at, mask = images.rows, images.tokens

        def spread(name: str, tensor: Tensor, *sizes: int) -> Tensor:
            grown = lambda: _spread(_grown(tensor, given, *sizes), at, rows, 0)  # noqa: E731
            fits = given == rows and tensor.shape[1 : 1 + len(sizes)] == sizes
            return tensor if fits else self._once(f"images.{name}", (rows, *sizes), grown, tensor, at)

        def visible() -> Tensor:
            seen = images.kv.new_ones(given, groups, tokens, dtype=torch.bool) if mask is None else mask
            return _spread(_grown(_grown(seen, given, groups, length), given, more, value=1), at, rows, 1)

        return ImageInputs(
            at if given == rows else self._once("images.rows", rows, lambda: torch.arange(rows, device=at.device), at),
            spread("kv", images.kv, more, length),
            self._once("images.tokens", (rows, more, length), visible, images.kv if mask is None else mask, at),
            spread("scale", images.scale, more),
            spread("areas", images.areas, more) if images.areas is not None else None,
        )

    def _context(self, name: str, context: ContextInputs) -> ContextInputs:
        """The last row is computed and written several times, each time the same: another may be in another chain."""
        count = bucket(len(context.rows), ROWS)
        return replace(
            context,
            rows=self._repeated(f"{name}.rows", context.rows, count),
            weight=self._repeated(f"{name}.weight", context.weight, count),
        )

    def _lite(self, name: str, lite: LiteInputs) -> LiteInputs:
        """The last row is changed again by 0 times its own change."""
        count = bucket(len(lite.rows), ROWS)
        return replace(
            lite,
            rows=self._repeated(f"{name}.rows", lite.rows, count),
            embeddings={
                target: self._repeated(f"{name}.{target}", embedding, count)
                for target, embedding in lite.embeddings.items()
            },
            weight=self._grown(f"{name}.weight", lite.weight, count),
        )

    def _grown(self, name: str, tensor: Tensor, *sizes: int) -> Tensor:
        if tensor.shape[: len(sizes)] == sizes:
            return tensor
        return self._once(name, sizes, lambda: _grown(tensor, *sizes), tensor)

    def _repeated(self, name: str, tensor: Tensor, count: int) -> Tensor:
        missing = count - len(tensor)
        if not missing:
            return tensor
        last = tensor[-1:].expand(missing, *tensor.shape[1:])
        return self._once(name, count, lambda: torch.cat([tensor, last]), tensor)

    def _once(self, name: str, size: Hashable, make: Callable[[], Tensor], *sources: Tensor) -> Tensor:
        """Make a tensor, or return that of the last step if it was made of the same ones. It is not kept longer than
        they are.
        """
        known = self._made.get(name)
        if (
            known is None
            or known.size != size
            or any(a() is not b for a, b in zip(known.sources, sources, strict=True))
        ):
            owner = weakref.ref(self)  # no cycle, which would keep the tensors until it is collected

            def forget(_: weakref.ref[Tensor]) -> None:
                if (padding := owner()) is not None:
                    padding._made.pop(name, None)  # noqa: SLF001 - its own class

            known = _Made([weakref.ref(source, forget) for source in sources], size, make())
            self._made[name] = known
        return known.tensor


def bucket(count: int, sizes: Sequence[int]) -> int:
    """Return the first of these rising sizes that holds `count`, or a multiple of the last one."""
    return next((size for size in sizes if count <= size), -(-count // sizes[-1]) * sizes[-1])


def _power_of_two(count: int) -> int:
    """Return the least power of two that is not less than `count`."""
    return 1 << (count - 1).bit_length()


def _grown(tensor: Tensor, *sizes: int, value: float = 0) -> Tensor:
    """Pad the ends of the first dims to these sizes. Returns the tensor itself if it has them."""
    missing = [size - own for size, own in zip(sizes, tensor.shape, strict=False)]
    if not any(missing):
        return tensor
    untouched = tensor.ndim - len(sizes)
    return pad(tensor, (0, 0) * untouched + tuple(end for size in reversed(missing) for end in (0, size)), value=value)


def _spread(tensor: Tensor, at: Tensor, rows: int, value: float) -> Tensor:
    """Put row i of the tensor at row at[i] of `rows`, and `value` at the others."""
    return tensor.new_full((rows, *tensor.shape[1:]), value).index_copy(0, at, tensor)
