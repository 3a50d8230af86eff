"""Read one module's tensors into a record's module: one reader for each algorithm.

The scale of a change is α/r with the rank r; a missing α and α = 0 mean α = r; `.scale` replaces both. A reader takes
the parts that it knows; the caller refuses the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from scumble.errors import Refused
from scumble_registry.compatibility import Shape, has_bias
from scumble_registry.formats.lora import algebra
from scumble_registry.formats.lora.peft import Scaling
from scumble_registry.formats.lora.record import (
    Dense,
    Gain,
    Kronecker,
    LoraModule,
    Magnitude,
    Module,
    Pair,
    Product,
    Rotation,
    check_module,
    check_scale,
    make_module,
)
from scumble_registry.formats.lora.rotation import cayley, neumann, packed_skew, unshuffled
from scumble_registry.formats.safetensors_header import Array

_MAX_RATIO, _MAX_VALUES = 4, 1 << 27
"""The most values of a computed product: relative to the base's weight, or in all where the base is not known."""


@dataclass(slots=True)
class ModuleTensors:
    """A file's tensors for one target; `taken` are the parts that were read so far."""

    target: str
    values: Mapping[str, Array]
    shape: Shape | None
    """Shape of the base's weight, if the base is known."""
    scaling: Scaling
    clamped: bool = False
    """Whether it is kohya's OFT, where α limits the rotation even if it is 0."""
    taken: set[str] = field(default_factory=set)

    @property
    def module(self) -> str:
        """The target without its component."""
        return self.target.partition(".")[2]

    def has(self, *names: str) -> bool:
        return all(name in self.values for name in names)

    def take(self, name: str) -> Array | None:
        if name not in self.values:
            return None
        self.taken.add(name)
        return self.values[name]

    def need(self, name: str) -> Array:
        values = self.take(name)
        if values is None:
            raise Refused(f"{self.target} lacks {name} beside {', '.join(sorted(self.values))}", target=self.target)
        return values

    def number(self, name: str) -> float | None:
        values = self.take(name)
        if values is None:
            return None
        if values.size != 1:
            raise Refused(f"{self.target}: its {name} has shape {values.shape}; one number is needed")
        return float(values.reshape(()))

    def alpha(self, rank: int) -> float | None:
        """Return α; None means the rank."""
        own, scale = self.number("alpha"), self.number("scale")
        if scale is not None:
            return scale * rank
        return (own or None) if own is not None else self.scaling.alpha_of(self.module, rank)

    def scale(self, rank: int) -> float:
        alpha = self.alpha(rank)
        scale = float(np.float32(1.0 if alpha is None else alpha / rank))
        check_scale(self.target, scale)
        return scale

    def check_size(self, *shape: int) -> None:
        """Check a product before it is computed, as a small file may describe a large one. Raises Refused."""
        limit = _MAX_RATIO * int(np.prod(self.shape)) if self.shape is not None else _MAX_VALUES
        if math.prod(shape) > limit:
            size = "x".join(map(str, shape))
            raise Refused(f"{self.target}: its parts make {size}, more than its weight can be", target=self.target)

    def weight(self) -> Shape:
        """Return the shape of the base's weight. Raises Refused without a base."""
        if self.shape is None:
            raise Refused(
                f"{self.target}: the shape of its weight is known from the base only; publish it with --base REF",
                target=self.target,
            )
        return self.shape


def build(parts: ModuleTensors) -> tuple[Module, str] | None:
    """Return the module and its algorithm's name; None for incomplete parts. Raises Refused naming the target."""
    for needed, name, read in _READERS:
        if parts.has(*needed):
            module = read(parts)
            check_module(parts.target, module, parts.shape)
            return module, name
    if parts.has("diff_b") and has_bias(parts.target):
        module = Dense(None, bias=_vector(parts, "diff_b"))
        check_module(parts.target, module, parts.weight())
        return module, "bias"
    return None


def _lora(parts: ModuleTensors) -> Module:
    down, up, mid = parts.need("down"), parts.need("up"), parts.take("mid")
    if mid is not None:
        down = _tucker(parts, down, mid)
    rank = down.shape[0] if down.ndim else 0
    alpha = parts.alpha(rank)
    bias = _bias(parts)
    if bias is None and parts.has("up_bias") and has_bias(parts.target):
        scale = 1.0 if alpha is None else alpha / max(rank, 1)
        bias = algebra.as_float32(_vector(parts, "up_bias")) * np.float32(scale)
    magnitude = _magnitude(parts, up.shape[0], down.shape[1]) if min(down.ndim, up.ndim) > 1 else None
    return make_module(parts.target, down, up, alpha, magnitude, bias=bias)


def _tucker(parts: ModuleTensors, down: Array, mid: Array) -> Array:
    target = parts.target
    if mid.ndim != 4 or down.ndim not in {2, 4} or mid.shape[1] != down.shape[0] or down.shape[2:] not in {(), (1, 1)}:
        raise Refused(f"{target}: mid {mid.shape} does not fit after down {down.shape}", target=target)
    parts.check_size(mid.shape[0], down.shape[1], *mid.shape[2:])
    return algebra.tucker(down, mid)


def _loha(parts: ModuleTensors) -> Module:
    pairs: list[tuple[Array, Array]] = []
    for half in "12":
        up, down, mid = parts.need(f"hada_w{half}_a"), parts.need(f"hada_w{half}_b"), parts.take(f"hada_t{half}")
        if mid is not None:
            _check_halves(parts, up.T, mid, down)
            up, down = algebra.tucker_factors(mid, up, down)
        _check_product(parts.target, up, down)
        pairs.append((up, down))
    (up1, down1), (up2, down2) = pairs
    out, rank = up1.shape
    kernel = down1.shape[2:] or _kernel(parts, down1.shape[1])
    into = down1.size // (rank * int(np.prod(kernel)))
    shape = (out, into, *kernel)
    flat1, flat2 = down1.reshape(len(down1), -1), down2.reshape(len(down2), -1)
    if up2.shape[0] != out or flat2.shape[1] != flat1.shape[1]:
        raise Refused(f"{parts.target}: the halves of its product are of different shapes", target=parts.target)
    parts.check_size(*shape)
    scale, magnitude, bias = parts.scale(rank), _magnitude(parts, out, into), _bias(parts)
    if not algebra.fit_row(rank * up2.shape[1], shape):
        return Product(Pair(up1, flat1), Pair(up2, flat2), float(np.float32(scale * rank)), shape, magnitude, bias)
    up, down = algebra.hadamard_factors(up1, flat1, up2, flat2)
    return _factors(parts.target, up, down.reshape(len(down), into, *kernel), scale, magnitude, bias)


def _lokr(parts: ModuleTensors) -> Module:
    left, rank_left = _half(parts, "lokr_w1")
    if left[1].ndim != 2:
        raise Refused(f"{parts.target}: the left side of a Kronecker product has no kernel", target=parts.target)
    right, rank_right = _half(parts, "lokr_w2", columns=left[1].shape[1])
    rank = rank_right or rank_left
    if rank is None:
        # both sides whole: α has no effect, except in PEFT, which divides it by the config's rank
        parts.take("alpha")
        config_rank = parts.scaling.rank_of(parts.module)
        scale = parts.scale(config_rank) if config_rank is not None else 1.0
    else:
        scale = parts.scale(rank)
    (up1, down1), (up2, down2) = left, right
    shape = (len(up1) * len(up2), down1.shape[1] * down2.shape[1], *down2.shape[2:])
    parts.check_size(*shape)
    magnitude, bias = _magnitude(parts, shape[0], shape[1]), _bias(parts)
    if algebra.fit_row(len(down1) * len(down2), shape):
        up, down = algebra.kronecker_factors(up1, down1, up2, down2)
        return _factors(parts.target, up, down, scale, magnitude, bias)
    whole = (up2 @ down2.reshape(len(down2), -1)).reshape(len(up2), *down2.shape[1:])
    return Kronecker((up1 @ down1) * np.float32(scale), whole, magnitude, bias)


def _half(parts: ModuleTensors, name: str, columns: int | None = None) -> tuple[tuple[Array, Array], int | None]:
    """Return one side of a Kronecker product as factors, and its rank; None for a side that is stored whole.

    `columns` are the other side's, which with the base's shape determine a flattened kernel.
    """
    whole = parts.take(name)
    if whole is not None:
        if whole.ndim not in ({2} if name == "lokr_w1" else {2, 4}) or 0 in whole.shape:
            raise Refused(f"{parts.target}: {name} of shape {whole.shape} is no matrix", target=parts.target)
        return algebra.identity_factors(whole), None
    up, down = parts.need(f"{name}_a"), parts.need(f"{name}_b")
    mid = parts.take("lokr_t2") if name == "lokr_w2" else None
    if mid is not None:
        _check_halves(parts, up.T, mid, down)
        up, down = algebra.tucker_factors(mid, up, down)
    _check_product(parts.target, up, down)
    rank = int(down.shape[0])
    if down.ndim == 2 and columns is not None and (kernel := _kernel(parts, columns * down.shape[1])):
        down = down.reshape(rank, -1, *kernel)
    if rank > min(len(up), down.size // rank):
        product = algebra.as_float32(up) @ algebra.as_float32(down).reshape(rank, -1)
        return algebra.identity_factors(product.reshape(len(up), *down.shape[1:])), rank
    return (algebra.as_float32(up), algebra.as_float32(down)), rank


def _kernel(parts: ModuleTensors, flat: int) -> Shape:
    """Return the kernel shape of the base's convolution if `flat` is its channels times taps, else ()."""
    shape = parts.shape or ()
    return shape[2:] if len(shape) == 4 and shape[2:] != (1, 1) and flat == int(np.prod(shape[1:])) else ()


def _factors(
    target: str, up: Array, down: Array, scale: float, magnitude: Magnitude | None, bias: Array | None
) -> LoraModule:
    ones = (1,) * (down.ndim - 2)
    return make_module(target, down, up.reshape(*up.shape[:2], *ones), scale * len(down), magnitude, bias=bias)


def _check_product(target: str, up: Array, down: Array) -> None:
    if up.ndim != 2 or down.ndim not in {2, 4} or up.shape[1] != down.shape[0] or 0 in (*up.shape, *down.shape):
        raise Refused(f"{target}: {up.shape} and {down.shape} are no factors of one matrix", target=target)


def _check_halves(parts: ModuleTensors, up: Array, mid: Array, down: Array) -> None:
    target = parts.target
    if mid.ndim != 4 or up.ndim != 2 or down.ndim != 2 or mid.shape[:2] != (up.shape[1], down.shape[0]):
        raise Refused(f"{target}: {up.shape}, {mid.shape} and {down.shape} are no factors of one kernel", target=target)
    parts.check_size(mid.shape[0], down.shape[1], *mid.shape[2:])


def _full(parts: ModuleTensors) -> Module:
    delta = parts.need("diff")
    if delta.ndim not in {1, 2, 4} or 0 in delta.shape:
        raise Refused(f"{parts.target}: a difference of shape {delta.shape} fits no weight", target=parts.target)
    magnitude = _magnitude(parts, delta.shape[0], delta.shape[1]) if delta.ndim > 1 else None
    return Dense(delta, magnitude, _bias(parts))


def _ia3(parts: ModuleTensors) -> Module:
    values, on_input = parts.need("ia3"), parts.number("on_input")
    return _gain(parts, values.reshape(-1), axis=1 if on_input else 0)


def _peft_ia3(parts: ModuleTensors) -> Module:
    """Read PEFT's IA³: factors on a feed-forward layer's input, and on other layers' output with their bias."""
    factor = parts.need("peft_ia3")
    into = parts.scaling.reads_input(parts.module)
    values = np.asarray(factor, dtype=np.float32).reshape(-1) - 1
    return _gain(parts, values, axis=1 if into else 0, with_bias=not into and has_bias(parts.target))


def _gain(parts: ModuleTensors, values: Array, axis: int, *, with_bias: bool = False) -> Module:
    shape = parts.weight()
    if len(values) != shape[axis]:
        raise Refused(
            f"{parts.target}: {len(values)} gains for {shape[axis]} {('rows', 'columns')[axis]} of its weight",
            target=parts.target,
        )
    return Gain(values, axis, values if with_bias else None, _bias(parts))


def _glora(parts: ModuleTensors) -> Module:
    """Read ΔW = α/r (W a₁ a₂ + b₁ b₂). Old files have the indices of each pair swapped."""
    a1, a2, b1, b2 = (parts.need(f"glora_{name}") for name in ("a1", "a2", "b1", "b2"))
    for values in (a1, a2, b1, b2):
        if values.ndim not in {2, 4} or 0 in values.shape:
            raise Refused(f"{parts.target}: GLoRA's four parts are matrices, not {values.shape}", target=parts.target)
    if not (a1.shape[1] == a2.shape[0] == b1.shape[1] == b2.shape[0]):
        a1, a2, b1, b2 = a2, a1, b2, b1
    if any(values.shape[2:] not in {(), (1, 1)} for values in (a1, a2, b1)):
        raise Refused(f"{parts.target}: of GLoRA's four parts only b2 has a kernel", target=parts.target)
    mid = parts.take("glora_bm")
    down = b2 if mid is None else _tucker(parts, b2, mid)
    if down.ndim == 4 and down.shape[2:] == (1, 1):
        down, b1 = down.reshape(down.shape[:2]), b1.reshape(b1.shape[:2])
    inner = Pair(a1.reshape(a1.shape[:2]), a2.reshape(a2.shape[:2]))
    return make_module(parts.target, down, b1, parts.alpha(len(down)), inner=inner, bias=_bias(parts))


def _oft(parts: ModuleTensors) -> Module:
    blocks = _blocks(parts, "oft_blocks")
    alpha = parts.number("alpha") or 0.0
    limit = alpha * blocks.shape[-3] * blocks.shape[-2]
    rotations = cayley(blocks, limit if alpha > 0 or parts.clamped else None)
    # OFT multiplies from the other side than a butterfly's stages, and does not shuffle rows
    if blocks.ndim == 4 and len(blocks) == 1 and blocks.shape[-1] % 2 == 0:
        rotations = unshuffled(rotations)
    return _rotation(parts, rotations.swapaxes(1, 2)[None] if blocks.ndim == 3 else rotations, axis=0)


def _oft_diag(parts: ModuleTensors) -> Module:
    """Read the rotations of old LyCORIS."""
    blocks = algebra.as_float32(_blocks(parts, "oft_diag"))
    parts.take("alpha")
    return _rotation(parts, blocks.swapaxes(1, 2)[None] if blocks.ndim == 3 else blocks, axis=0)


def _blocks(parts: ModuleTensors, name: str) -> Array:
    blocks = parts.need(name)
    if blocks.ndim not in {3, 4} or blocks.shape[-1] != blocks.shape[-2] or 0 in blocks.shape:
        raise Refused(f"{parts.target}: blocks of shape {blocks.shape} are not square", target=parts.target)
    parts.check_size(*blocks.shape[-2:])
    return blocks


def _peft_oft(parts: ModuleTensors) -> Module:
    """Read PEFT's OFT on a layer's input, with blocks as upper triangles."""
    packed, shape, config = parts.need("peft_oft"), parts.weight(), parts.scaling
    if packed.ndim != 2 or shape[2:] not in {(), (1, 1)}:
        raise Refused(
            f"{parts.target}: PEFT's OFT of a {'x'.join(map(str, shape[2:]))} convolution differs from its own merged "
            "weight; only linear layers and 1x1 convolutions can be served",
            target=parts.target,
        )
    block = round((1 + (1 + 8 * packed.shape[1]) ** 0.5) / 2)
    if block * (block - 1) != 2 * packed.shape[1]:
        raise Refused(
            f"{parts.target}: {packed.shape[1]} values a row are no upper triangle of a block", target=parts.target
        )
    parts.check_size(block, block)
    skew = packed_skew(packed, block)
    # Cayley's (I − Q)(I + Q)⁻¹; `cayley` subtracts the transpose, which doubles Q
    rotations = neumann(skew, config.neumann_terms) if config.neumann_terms else cayley(skew / -2)
    if len(rotations) == 1 < shape[1] // block:
        rotations = np.repeat(rotations, shape[1] // block, 0)  # shared by all blocks
    return _rotation(parts, rotations.swapaxes(1, 2)[None], axis=1)


def _peft_boft(parts: ModuleTensors) -> Module:
    blocks, rescale = _blocks(parts, "peft_boft"), parts.take("peft_boft_s")
    if blocks.ndim != 4 or len(blocks) != 1 or parts.weight()[2:] not in {(), (1, 1)}:
        raise Refused(
            f"{parts.target}: of PEFT's BOFT only boft_n_butterfly_factor 1 on linear layers and 1x1 convolutions can "
            f"be served, these are {blocks.shape}",
            target=parts.target,
        )
    # Q = (B − Bᵀ)/2 and (I − Q)(I + Q)⁻¹
    rotations = cayley(np.asarray(blocks, dtype=np.float64) / -2).swapaxes(2, 3)
    return _rotation(parts, rotations, axis=1, rescale=rescale)


def _rotation(parts: ModuleTensors, blocks: Array, axis: int, rescale: Array | None = None) -> Module:
    shape = parts.weight()
    rescale = parts.take("rescale") if rescale is None else rescale
    stages, count, size = blocks.shape[:3] if blocks.ndim == 4 else (0, 0, 0)
    reach = 2 ** max(stages - 1, 0) * size
    if blocks.ndim != 4 or blocks.shape[3] != size or count * size != shape[axis] or (stages > 1 and size % 2):
        raise Refused(
            f"{parts.target}: blocks of shape {blocks.shape} do not rotate {shape[axis]} "
            f"{('rows', 'columns')[axis]} of its weight",
            target=parts.target,
        )
    if shape[axis] % reach or not np.isfinite(blocks).all():
        raise Refused(f"{parts.target}: its rotation cannot be computed", target=parts.target)
    if rescale is not None:
        rescale = rescale.reshape(-1)
        if len(rescale) != shape[0]:
            raise Refused(f"{parts.target}: {len(rescale)} scales for {shape[0]} rows", target=parts.target)
    return Rotation(np.ascontiguousarray(blocks), axis, rescale, _bias(parts))


def _magnitude(parts: ModuleTensors, out: int, into: int) -> Magnitude | None:
    """Read a DoRA's magnitudes (out,), (out, 1[, 1, 1]) or (1, in[, 1, 1]).

    Four dimensions that begin with 1 are PEFT's (1, out, 1, 1) or kohya's (1, in, 1, 1). Raises Refused.
    """
    for name, of_convolution in (("dora_scale", 1), ("magnitude_vector", 0)):
        values = parts.take(name)
        if values is None:
            continue
        lengths = values.reshape(-1)
        if values.ndim == 1 or values.shape == (out, *(1,) * (values.ndim - 1)):
            return Magnitude(lengths, 0)
        if values.ndim in {2, 4} and values.shape[0] == 1 and values.size == values.shape[1]:
            return Magnitude(lengths, of_convolution if values.ndim == 4 else 1)
        raise Refused(
            f"{parts.target}: magnitudes of shape {values.shape} beside a weight of {out}x{into}", target=parts.target
        )
    return None


def _bias(parts: ModuleTensors) -> Array | None:
    return _vector(parts, "diff_b") if parts.has("diff_b") and has_bias(parts.target) else None


def _vector(parts: ModuleTensors, name: str) -> Array:
    return parts.need(name).reshape(-1)


_READERS: tuple[tuple[tuple[str, ...], str, Callable[[ModuleTensors], Module]], ...] = (
    (("lokr_w1",), "LoKr", _lokr),
    (("lokr_w1_a", "lokr_w1_b"), "LoKr", _lokr),
    (("hada_w1_a", "hada_w1_b"), "LoHa", _loha),
    (("oft_blocks",), "OFT", _oft),
    (("oft_diag",), "OFT", _oft_diag),
    (("ia3", "on_input"), "IA³", _ia3),
    (("glora_a1", "glora_a2"), "GLoRA", _glora),
    (("peft_oft",), "OFT", _peft_oft),
    (("peft_boft",), "BOFT", _peft_boft),
    (("peft_ia3",), "IA³", _peft_ia3),
    (("diff",), "full", _full),
    (("down", "up"), "LoRA", _lora),
)
"""In the order of recognition: the parts that a module must have, the algorithm's name, its reader."""
