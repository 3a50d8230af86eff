"""The prompt tokenizer: CLIP's byte-level BPE, trained on the captions and on the names of all emoji."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

MAX_LENGTH = 77
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
_SUFFIX = "</w>"


def train_tokenizer(texts: Iterable[str], vocabulary: int = 2600) -> CLIPTokenizer:
    """Train merges, with the vocabulary in CLIP's order: bytes, bytes at a word's end, merges, bos, eos.

    Every byte has a token, so no prompt is ever unknown. The pad token is eos, as in SD 1.5.
    """
    frame = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(BPE(continuing_subword_prefix="", end_of_word_suffix=_SUFFIX))
    learner.normalizer, learner.pre_tokenizer = frame.normalizer, frame.pre_tokenizer
    letters = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=vocabulary - 2,
        initial_alphabet=letters,
        end_of_word_suffix=_SUFFIX,
        min_frequency=2,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    state = learner.model.__getstate__()
    merges = _merges(state)
    order = [*letters, *(letter + _SUFFIX for letter in letters), *("".join(pair) for pair in merges), BOS, EOS]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(order))}
    # The tokenizer's BPE takes pairs, although the annotation differs.
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)  # type: ignore[arg-type]


def _merges(state: bytes) -> list[tuple[str, str]]:
    import json

    return [(str(left), str(right)) for left, right in json.loads(state)["merges"]]
