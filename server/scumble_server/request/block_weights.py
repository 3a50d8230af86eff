"""Block weights of a LoRA: the usual lists of numbers, or weights by block name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scumble.errors import InvalidRequest
from scumble_build.graphs.blocks import UNetBlocks

FIELD = "adapters.blocks"


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """A weight for every target: that of the longest module path that it lies under, else of its block, else 1."""

    labels: tuple[tuple[str, float], ...]
    paths: tuple[tuple[str, float], ...]
    blocks: UNetBlocks

    def of(self, target: str) -> float:
        under = [(len(path), weight) for path, weight in self.paths if (target + ".").startswith(path + ".")]
        if under:
            return max(under)[1]
        return dict(self.labels).get(self.blocks.label(target), 1.0)


def block_weights(
    given: Mapping[str, float] | Sequence[float] | None, blocks: UNetBlocks, targets: Iterable[str]
) -> BlockWeights | None:
    """None where all blocks weigh 1. Raises InvalidRequest for a list of another length or an unknown name."""
    if given is None:
        return None
    targets = list(targets)
    if not isinstance(given, Mapping):
        return BlockWeights(tuple(zip(_labels(len(given), blocks, targets), given, strict=True)), (), blocks)
    labels = {name: weight for name, weight in given.items() if name in blocks.labels}
    paths = {_canonical(name): weight for name, weight in given.items() if name not in labels}
    for path in paths:
        if not any((target + ".").startswith(path + ".") for target in targets):
            raise InvalidRequest(
                f"the base has no block {path!r}; name one of {', '.join(blocks.labels)}, "
                "or a module path such as mid_block or up_blocks.1",
                field=FIELD,
            )
    return BlockWeights(tuple(sorted(labels.items())), tuple(sorted(paths.items())), blocks)


def _labels(length: int, blocks: UNetBlocks, targets: Sequence[str]) -> tuple[str, ...]:
    """The webui's lists: one value for every block, or for the text encoder and every block with attention."""
    attention = {blocks.label(target) for target in targets if ".attentions." in target}
    short = tuple(label for label in blocks.labels if label == "BASE" or label in attention)
    for labels in (blocks.labels, short):
        if len(labels) == length:
            return labels
    raise InvalidRequest(
        f"{length} block weights were given; this base takes {len(blocks.labels)} ({', '.join(blocks.labels)}) "
        f"or {len(short)} ({', '.join(short)})",
        field=FIELD,
    )


def _canonical(path: str) -> str:
    return path if path.split(".", maxsplit=1)[0] in {"unet", "text_encoder"} else f"unet.{path}"
