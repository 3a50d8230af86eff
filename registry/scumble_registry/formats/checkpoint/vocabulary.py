"""Write CLIP's tokenizer, which single files leave out: every Stable Diffusion checkpoint uses the same one.

`bpe_merges.txt.gz` holds OpenAI's byte pair merges, one pair a line, in the order of their rank. The vocabulary is
each byte, each byte at the end of a word, each merge, and the tokens for start and end.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

_MERGES = Path(__file__).with_name("bpe_merges.txt.gz")
_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"


def write_tokenizer(folder: Path, *, pad: str = _END) -> None:
    """Write the files of a CLIPTokenizer; SD 2.x and SDXL's second encoder pad with `!`."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = gzip.decompress(_MERGES.read_bytes()).decode("utf-8").splitlines()
    letters = _letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(line.replace(" ", "") for line in merges)]
    vocabulary = {word: index for index, word in enumerate([*words, _BEGIN, _END])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    names = {"bos_token": _BEGIN, "eos_token": _END, "unk_token": _END, "pad_token": pad}
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def _letters() -> list[str]:
    """Return a letter for each byte, printable ones first, others from code point 256 on (Radford et al., GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
