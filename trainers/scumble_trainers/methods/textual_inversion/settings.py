"""Settings of a textual inversion run, in addition to those of every run."""

from __future__ import annotations

from collections.abc import Sequence

from scumble.errors import InvalidRequest
from scumble_trainers.data.dataset import Example
from scumble_trainers.settings import MODEL, TRAIN, TrainSettings, option


class TextualInversionSettings(TrainSettings):
    """The word and its initial vectors. The learning rate is higher than for weights, and there is no weight decay."""

    token: str = option(panel=MODEL, help='The new word, as written in the captions, e.g. "<bell>".', min_length=1)
    vectors: int = option(1, panel=MODEL, help="Number of its vectors.", ge=1, le=75)
    initial_words: str = option("", panel=MODEL, help='Words whose embeddings it starts from, e.g. "bird".')
    learning_rate: float = option(5e-3, panel=TRAIN, help="Of AdamW.", gt=0, le=10)
    weight_decay: float = option(0.0, panel=TRAIN, help="Of AdamW.", ge=0)
    caption_dropout: float = option(0.0, panel=TRAIN, help="Share of rows trained without a caption.", ge=0, le=1)

    def check_examples(self, examples: Sequence[Example]) -> None:
        super().check_examples(examples)
        if self.token.split() != [self.token]:
            raise InvalidRequest(f"--token {self.token!r} is not a single word", field="token")
        without = [example.name for example in examples if not any(self.token in text for text in example.texts)]
        if without:
            raise InvalidRequest(
                f"{len(without)} pictures, such as {without[0]}, have no caption with {self.token}: add it",
                field="token",
            )
