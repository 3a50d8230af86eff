"""Read keys of all layouts: key → the base's module, and the part of an algorithm.

Keys are read one by one, so a file may mix layouts. There are two families of names:

flat      `<prefix><module with '.' as '_'>.<part>`: kohya's `lora_unet_`, `lora_te_`, `lora_te1_`, `lora_te2_`,
          kohya's OFT `oft_unet_`, LyCORIS' own `lycoris_`. The UNet's modules by diffusers' or original (sgm) names.
          '_' has no unique inverse, so names are looked up in a dictionary of the base's targets (no two of SD 1.5's
          391 or SDXL's 1050 collide), and the base must be known.
dotted    `<prefix><module>.<part>`: diffusers' `unet.`, `text_encoder.`, `text_encoder_2.`, or no prefix for a UNet (in
          the oldest files), PEFT's `base_model.model.`; and the webui forks' `diffusion_model.<original name>`,
          `text_encoders.clip_l.transformer.…`, whose modules are looked up in the base too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from scumble_registry.compatibility import BaseCompatibility, canonical_name, norm_shapes
from scumble_registry.compatibility.original_names import original_names

PARTS: dict[str, str] = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_B.bias": "up_bias",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_mid.weight": "mid",
    "alpha": "alpha",
    "scale": "scale",
    "dora_scale": "dora_scale",
    "lora_magnitude_vector": "magnitude_vector",
    "lora_magnitude_vector.weight": "magnitude_vector",
    **{f"hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "diff": "diff",
    "diff_b": "diff_b",
    "w_norm": "diff",
    "b_norm": "diff_b",
    "weight": "ia3",
    "on_input": "on_input",
    **{f"{name}.weight": f"glora_{name}" for name in ("a1", "a2", "b1", "b2", "bm")},
    "oft_blocks": "oft_blocks",
    "oft_diag": "oft_diag",
    "rescale": "rescale",
    "oft_R.weight": "peft_oft",
    "boft_R": "peft_boft",
    "boft_s": "peft_boft_s",
    "ia3_l": "peft_ia3",
}
"""End of a key, in all layouts → the part."""
_DOTTED = re.compile(rf"(?P<module>.+?)\.(?P<part>{'|'.join(sorted(map(re.escape, PARTS), key=len, reverse=True))})")
_PROCESSOR = re.compile(r"(?P<module>.+?)(?:\.processor)?\.to_(?P<layer>q|k|v|out)_lora\.(?P<part>down|up)\.weight")
_PROCESSOR_ALPHA = re.compile(r"(?P<module>.+?)(?:\.processor)?\.to_(?P<layer>q|k|v|out)_lora\.(?P<part>alpha)")
_NAMED = re.compile(
    r"\.(lora_[AB]|lora_magnitude_vector|hada_\w+?|lokr_\w+?|oft_R|boft_[Rs]|ia3_l)\.(?P<name>(?!weight$|bias$)\w+)(?=\.|$)"
)
_UNET = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in.", "conv_out.", "time_embedding.", "add_embedding.")
_TEXT = ("text_model.", "encoder.layers.", "text_projection.")
_MODULES = (*_TEXT, "base_model.model.", "diffusion_model.", "model.diffusion_model.", "text_encoders.")
"""What dotted modules may begin with, beside a component and the UNet's own modules."""
FLAT = ("lora_unet_", "lora_te", "oft_unet_", "lycoris_")
"""What flat modules begin with."""
_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
_TOWERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "clip_h": "text_encoder"}
_IN_TEXT = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}


@dataclass(frozen=True, slots=True)
class NamedKey:
    """The target and part of a key; `dialect` names the tool whose layout it has."""

    target: str
    part: str
    dialect: str


def is_key(key: str) -> bool:
    """Return whether it names a module of some base and a part of a change: no embedding's token looks like this.

    >>> is_key("lora_te_text_model_final_layer_norm.w_norm"), is_key("unet.conv_norm_out.diff"), is_key("<lora-cat>")
    (True, True, False)
    """
    module, _, part = key.partition(".")
    if module.startswith(FLAT):
        return part in PARTS
    match = _DOTTED.fullmatch(key)
    if match is None or match["part"] == "weight":  # a model's own
        return False
    return f"{match['module']}.".startswith(_MODULES) or _with_component(match["module"])[0] is not None


class Names:
    """Reads keys, with the base's modules if it is known."""

    def __init__(self, base: BaseCompatibility | None) -> None:
        self._flat: dict[str, tuple[str, str]] = flat_names(base) if base is not None else {}
        self._original = _original(base) if base is not None else {}

    def read(self, key: str) -> NamedKey | None:
        """Return the key's target and part; None for a key of no known layout."""
        return self._read_flat(key) or self._read_processor(key) or self._read_dotted(key)

    def _read_flat(self, key: str) -> NamedKey | None:
        module, _, part = key.partition(".")
        if module not in self._flat or part not in PARTS:
            return None
        target, dialect = self._flat[module]
        return NamedKey(target, PARTS[part], dialect)

    def _read_processor(self, key: str) -> NamedKey | None:
        match = _PROCESSOR.fullmatch(key) or _PROCESSOR_ALPHA.fullmatch(key)
        if match is None:
            return None
        module, dialect = _with_component(match["module"])
        if module is None:
            return None
        in_text = module.startswith("text_encoder")
        layer = _IN_TEXT[match["layer"]] if in_text else {"out": "to_out.0"}.get(match["layer"], f"to_{match['layer']}")
        return NamedKey(canonical_name(f"{module}.{layer}"), match["part"], dialect)

    def _read_dotted(self, key: str) -> NamedKey | None:
        match = _DOTTED.fullmatch(key)
        if match is None:
            return None
        part, module = PARTS[match["part"]], match["module"].removesuffix(".lora_linear_layer")
        if module.startswith(("diffusion_model.", "model.diffusion_model.")):
            target = self._original.get(module.partition("diffusion_model.")[2])
            return NamedKey(target, part, "original names") if target is not None else None
        if module.startswith("text_encoders."):
            tower, _, rest = module.removeprefix("text_encoders.").partition(".transformer.")
            known = tower in _TOWERS and rest
            return NamedKey(f"{_TOWERS[tower]}.{rest}", part, "original names") if known else None
        named, dialect = _with_component(module)
        if named is None:
            return None
        if dialect == "diffusers" and match["part"].startswith(("lora_A", "lora_B", "lora_mag")):
            dialect = "diffusers/PEFT"
        return NamedKey(canonical_name(named), part, dialect)


def without_adapter_names(keys: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Map keys to keys without the adapter's name (PEFT's `lora_A.default.weight`), and return the names too."""
    short: dict[str, str] = {}
    names: set[str] = set()
    for key in keys:
        match = _NAMED.search(key)
        short[key] = key if match is None else key[: match.start("name") - 1] + key[match.end("name") :]
        names |= {match["name"]} if match else set()
    return short, tuple(sorted(names))


def flat_names(base: BaseCompatibility) -> dict[str, tuple[str, str]]:
    """Return flat name → target and dialect, for every layer and norm of the base."""
    names: dict[str, tuple[str, str]] = {}
    for target in (*base.targets, *norm_shapes(base)):
        component, _, module = target.partition(".")
        flat = module.replace(".", "_")
        for prefix in text_prefixes(base, component) if component != "unet" else ("lora_unet_", "oft_unet_"):
            names[prefix + flat] = target, "kohya"
        if component == "unet":
            names[f"lycoris_{flat}"] = target, "LyCORIS"
    for original, target in _original(base).items():
        flat = original.replace(".", "_")
        names[f"lora_unet_{flat}"] = names[f"oft_unet_{flat}"] = target, "kohya, original names"
    return names


def text_prefixes(base: BaseCompatibility, component: str) -> tuple[str, ...]:
    """Return kohya's prefixes of a text encoder; kohya's tools write the first."""
    if component == "text_encoder_2":
        return ("lora_te2_",)
    return ("lora_te1_",) if base.family == "sdxl" else ("lora_te_", "lora_te1_")


def original_targets(base: BaseCompatibility) -> Mapping[str, str]:
    """Return target → its original name, for the UNet's targets."""
    targets = (*base.targets, *norm_shapes(base))
    modules = [target.removeprefix("unet.") for target in targets if target.startswith("unet.")]
    return {f"unet.{module}": name for module, name in original_names(modules).items()}


def _original(base: BaseCompatibility) -> dict[str, str]:
    return {name: target for target, name in original_targets(base).items()}


def _with_component(module: str) -> tuple[str | None, str]:
    """Return `unet.down_blocks.…` for `down_blocks.…`, and the dialect; None for a module of no component."""
    component, _, rest = module.partition(".")
    if component in _COMPONENTS and rest:
        return module, "diffusers"
    bare, dialect = module, "diffusers, without prefix"
    if module.startswith("base_model.model."):
        bare, dialect = module.removeprefix("base_model.model."), "PEFT"
    if f"{bare}.".startswith(_UNET):
        return f"unet.{bare}", dialect
    if dialect == "PEFT" and f"{bare}.".startswith(_TEXT):
        return f"text_encoder.{bare}", dialect
    return None, dialect
