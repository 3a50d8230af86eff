"""CLIP's tokenizer, which single files leave out."""

from __future__ import annotations

from pathlib import Path

from scumble_registry.formats.checkpoint import configs
from scumble_registry.formats.checkpoint.vocabulary import write_tokenizer


def test_the_tokenizer_that_files_leave_out_is_clips(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    write_tokenizer(tmp_path / "one")
    write_tokenizer(tmp_path / "two", pad="!")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "one", local_files_only=True)
    assert len(tokenizer) == configs.VOCABULARY
    # Published ids of CLIP's for these words.
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("Hello World!").input_ids == [49406, 3306, 1002, 256, 49407]
    assert (tokenizer.pad_token_id, tokenizer.model_max_length) == (49407, 77)
    assert CLIPTokenizer.from_pretrained(tmp_path / "two", local_files_only=True).pad_token_id == 0
