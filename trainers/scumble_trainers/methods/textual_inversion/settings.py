"""What a textual inversion run can be told beside what every run can."""

from __future__ import annotations

from scumble_trainers.settings import MODEL, TRAIN, TrainSettings, option


class TextualInversionSettings(TrainSettings):
    """The word, and what it begins as. Vectors take larger steps than weights, and nothing pulls them to zero."""

    token: str = option(panel=MODEL, help='The new word, as the captions write it, e.g. "<bell>".', min_length=1)
    vectors: int = option(1, panel=MODEL, help="Vectors that it stands for.", ge=1, le=75)
    initial_words: str = option("", panel=MODEL, help='Words that it begins as, e.g. "bird".')
    learning_rate: float = option(5e-3, panel=TRAIN, help="Of AdamW.", gt=0, le=10)
    weight_decay: float = option(0.0, panel=TRAIN, help="Of AdamW.", ge=0)
    caption_dropout: float = option(0.0, panel=TRAIN, help="Share trained without caption.", ge=0, le=1)
