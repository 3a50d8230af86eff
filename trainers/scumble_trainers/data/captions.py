"""Captions as token ids and, if the text encoders are frozen, as embeddings computed once.

A caption that is longer than what a text encoder reads at once is read in chunks, as serving reads a prompt: each is
encoded alone, their states stand one behind the other, and what is pooled is the first one's.

SD 1.x and 2.x condition on the last hidden state of one encoder. SDXL has two: it reads their last but one hidden
states, concatenated, and the second one's pooled output (2307.01952).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from scumble_build.chunks import MAX_CHUNKS, Unit, chunked
from scumble_trainers.base import Pipeline
from scumble_trainers.data.dataset import Example

log = logging.getLogger(__name__)

CACHE_LIMIT = 2 * 2**30
"""Largest size in bytes of embeddings in memory; beyond it they are computed at every step."""


@dataclass(frozen=True, slots=True)
class TextStates:
    """The text conditioning of a UNet."""

    states: Tensor  # (B, n·T, D), of n chunks of T tokens
    pooled: Tensor | None  # (B, P), SDXL only

    def rows(self, chosen: Tensor) -> TextStates:
        return TextStates(self.states[chosen], None if self.pooled is None else self.pooled[chosen])

    def to(self, device: torch.device) -> TextStates:
        return TextStates(self.states.to(device), None if self.pooled is None else self.pooled.to(device))


@dataclass(frozen=True, slots=True)
class TokenIds:
    """N texts as token ids in chunks. Shorter ones are padded with chunks of an empty text, as serving pads them."""

    ids: Tensor  # (N, encoders, C, T) int64
    chunks: Tensor  # (N,) int64: how many of the C are the text's own
    cut: tuple[int, ...]
    """Texts of more than MAX_CHUNKS, of which the rest is left out."""


class TextEncoders(nn.Module):
    """A pipeline's one or two text encoders as one module, with their tokenizers."""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__()
        second = getattr(pipeline, "text_encoder_2", None)
        self.encoders = nn.ModuleList([pipeline.text_encoder, *([second] if second is not None else [])])
        self.tokenizers: list[CLIPTokenizer] = [pipeline.tokenizer]
        if second is not None:
            self.tokenizers.append(pipeline.tokenizer_2)

    def tokenize(self, texts: Sequence[str]) -> TokenIds:
        """Tokenize texts, by the tokenizer of each encoder."""
        read = [[tokenize(own, text) for own in self.tokenizers] for text in texts]
        whole = torch.tensor([max(len(chunks) for chunks in of_text) for of_text in read])
        kept = whole.clamp(max=MAX_CHUNKS)
        most = int(kept.max())
        ids = [torch.stack([_padded(*pair, most) for pair in zip(self.tokenizers, each, strict=True)]) for each in read]
        return TokenIds(torch.stack(ids), kept, tuple((whole > MAX_CHUNKS).nonzero().flatten().tolist()))

    def forward(self, tokens: Tensor) -> TextStates:
        """Encode token ids `(N, encoders, n, T)` on the encoders' device."""
        texts, _, chunks, _ = tokens.shape
        rows = [tokens[:, index].flatten(0, 1) for index in range(len(self.encoders))]
        if len(self.encoders) == 1:
            states: Tensor = self.encoders[0](rows[0])[0]
            return TextStates(states.reshape(texts, -1, states.shape[-1]), None)
        outputs = [encoder(own, output_hidden_states=True) for encoder, own in zip(self.encoders, rows, strict=True)]
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return TextStates(states.reshape(texts, -1, states.shape[-1]), outputs[-1][0][::chunks])

    @property
    def width(self) -> int:
        """Number of floats of a token's state."""
        return sum(int(cast(Any, encoder).config.hidden_size) for encoder in self.encoders)


@dataclass(frozen=True, slots=True)
class Captions:
    """The distinct captions of N examples. Row 0 is the empty one, for caption dropout."""

    tokens: Tensor  # (U, encoders, C, T) int64
    chunks: Tensor  # (U,) int64: how many of its C chunks a caption has itself
    first: Tensor  # (N,) int64: an example's captions are rows first … first + count - 1 of `rows`
    count: Tensor  # (N,) int64
    rows: Tensor  # (Σ count,) int64: rows of `tokens`
    embeddings: TextStates | None  # U rows, or None if they are computed at every step

    def choose(self, pictures: Tensor, which: Tensor) -> Tensor:
        """Return the rows of `tokens` `(B,)`: each picture's caption at `which` in [0, 1)."""
        offset = (which * self.count[pictures]).long()
        return self.rows[self.first[pictures] + offset]

    def by_length(self, rows: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Yield places in `rows (B,)` whose captions have as many chunks, and that number.

        What pads a caption changes what attention makes of it. So a batch is evaluated in one part for each length.
        """
        lengths = self.chunks[rows]
        for chunks in lengths.unique().tolist():
            yield (lengths == chunks).nonzero().flatten(), chunks

    def of(self, pictures: Tensor) -> Tensor:
        """Return the rows of `tokens` `(B,)` of each picture's first caption."""
        return self.rows[self.first[pictures]]

    def embed(self, encoders: TextEncoders, rows: Tensor, device: torch.device, chunks: int) -> TextStates:
        """Return the states of rows in `chunks` chunks on `device`: cached, or computed now, with gradients if the
        encoders are trained.
        """
        if self.embeddings is not None:
            text = self.embeddings.rows(rows)
            return TextStates(text.states[:, : chunks * self.tokens.shape[-1]], text.pooled).to(device)
        computed: TextStates = encoders(self.tokens[rows, :, :chunks].to(device))
        return computed


def tokenize(tokenizer: CLIPTokenizer, text: str) -> Tensor:
    """Tokenize a text to `(n, T)` int64: n chunks that are as full as they can be, padded as in the pipeline."""
    size = tokenizer.model_max_length - 2
    # Quietly: a long text is no mistake, it becomes several chunks.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    words = [_vectors(tokenizer, id_) for id_ in ids]
    chunks = chunked((Unit(number, width=len(word)) for number, word in enumerate(words)), size)
    tokens = torch.full((len(chunks), tokenizer.model_max_length), cast(int, tokenizer.pad_token_id))
    for row, chunk in enumerate(chunks):
        own = [tokenizer.bos_token_id, *(id_ for unit in chunk for id_ in words[unit.id]), tokenizer.eos_token_id]
        tokens[row, : len(own)] = torch.tensor(own)
    return tokens


def _vectors(tokenizer: CLIPTokenizer, word: int) -> list[int]:
    """Return the ids that stand for a token: its own, and those of a new word's further vectors, `<bell>_1` and so on.

    diffusers' `maybe_convert_prompt` writes them into the text, and warns of each long one.
    """
    added = tokenizer.added_tokens_encoder
    name = str(tokenizer.convert_ids_to_tokens(word)) if added else ""
    ids = [word]
    while name in added and (further := f"{name}_{len(ids)}") in added:
        ids.append(added[further])
    return ids


def _padded(tokenizer: CLIPTokenizer, tokens: Tensor, chunks: int) -> Tensor:
    """Cut or pad `(n, T)` to `(chunks, T)`."""
    missing = chunks - len(tokens)
    return torch.cat([tokens, *[tokenize(tokenizer, "")] * missing]) if missing > 0 else tokens[:chunks]


@torch.no_grad()
def read_captions(
    encoders: TextEncoders, examples: Sequence[Example], *, cache: bool, device: torch.device, batch: int = 32
) -> Captions:
    """Read all captions of `examples`; with `cache` they are embedded now if they fit CACHE_LIMIT."""
    row_of: dict[str, int] = {"": 0}
    rows = [row_of.setdefault(text, len(row_of)) for example in examples for text in example.texts]
    count = torch.tensor([len(example.texts) for example in examples])
    texts = list(row_of)
    read = encoders.tokenize(texts)
    _tell_cut(encoders, [texts[index] for index in read.cut])
    tokens = read.ids
    size = len(tokens) * tokens.shape[-2:].numel() * encoders.width * 4
    embeddings = None
    if cache and size <= CACHE_LIMIT:
        shares = [encoders(share.to(device)) for share in tokens.split(batch)]
        pooled = [share.pooled.float().cpu() for share in shares if share.pooled is not None]
        states = torch.cat([share.states.float().cpu() for share in shares])
        embeddings = TextStates(states, torch.cat(pooled) if pooled else None)
    return Captions(tokens, read.chunks, count.cumsum(0) - count, count, torch.tensor(rows), embeddings)


def _tell_cut(encoders: TextEncoders, texts: Sequence[str]) -> None:
    if texts:
        log.warning(
            "%d captions have more than the %d chunks of %d tokens that a prompt may have; the rest is not trained on. "
            "The first one: %s …",
            *(len(texts), MAX_CHUNKS, encoders.tokenizers[0].model_max_length - 2, texts[0][:60]),
        )
