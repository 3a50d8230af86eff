"""Prompts with embeddings in them: where a name is found, what it leaves free, how long ones are parted. No model."""

from __future__ import annotations

import pytest

from scumble_server.prompts.grammar.attention import parse_attention
from scumble_server.prompts.tokens import PromptWord, Slot, Tokens, tokenize, tokenize_weighted
from support.tiny_sd import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CAT = PromptWord("<cat>", 1)
INK = PromptWord("ink", 3)


def read(prompt: str, *names: PromptWord) -> tuple[str, Tokens]:
    """The prompt as it was read, with each vector of an embedding as #index."""
    tokens = tokenize(TOKENIZER, prompt, names)
    assert len(tokens.ids) == 1
    words = [TOKENIZER.decode([token]) for token in tokens.ids[0].tolist()]
    for slot in tokens.slots:
        for place in range(slot.position, slot.position + names[slot.embedding].vectors):
            words[place] = f"#{slot.embedding}"
    ids = tokens.ids[0].tolist()
    return "".join(words[1 : ids.index(TOKENIZER.eos_token_id)]), tokens


def test_without_names_it_is_what_the_tokenizer_says() -> None:
    for prompt in ("", "a red apple", "A  RED (apple:1.2), <cat>", "x " * 100, "naïve 🍎 <|endoftext|> end"):
        expected = TOKENIZER(prompt, padding="max_length", truncation=True, max_length=77).input_ids
        assert tokenize(TOKENIZER, prompt).ids[0].tolist() == expected
        assert tokenize(TOKENIZER, prompt, [PromptWord("nowhere", 4)]).ids[0].tolist() == expected


@pytest.mark.parametrize(
    ("prompt", "names", "expected"),
    [
        ("a <cat> asleep", [CAT], "a#0asleep"),
        ("a <CAT> asleep", [CAT], "a#0asleep"),
        ("<cat>", [CAT], "#0"),
        ("<cat>, asleep", [CAT], "#0,asleep"),
        ("((<cat>:1.2))", [CAT], "((#0:1.2))"),
        ("x<cat>y", [CAT], "x#0y"),
        ("< cat >", [CAT], "#0"),
        ("a cat", [CAT], "acat"),
        ("in ink, Ink (INK)", [INK], "in#0#0#0,#0#0#0(#0#0#0)"),
        ("think inking inks, ink-ing", [INK], "thinkinkinginks,#0#0#0-ing"),
        ("ink wash and ink", [INK, PromptWord("ink wash", 2)], "#1#1and#0#0#0"),
        ("ink  wash", [PromptWord("Ink Wash", 2)], "#0#0"),
        ("<a b> <a>", [PromptWord("<a>", 1), PromptWord("<a  b>", 2)], "#1#1#0"),
        ("ink <cat> ink", [CAT, INK], "#1#1#1#0#1#1#1"),
        ("v1- v1-, xv1-", [PromptWord("v1-", 1)], "#0#0,xv1-"),
        ("ÉTÉ e\u0301te\u0301", [PromptWord("<été>", 1), PromptWord("été", 1)], "#1#1"),
        ("a * b*", [PromptWord("*", 1)], "a#0b#0"),
    ],
)
def test_names_are_found(prompt: str, names: list[PromptWord], expected: str) -> None:
    assert read(prompt, *names)[0] == expected


def test_places_are_counted_from_the_start_of_the_row() -> None:
    _, tokens = read("a <cat> ink", CAT, INK)
    assert tokens.slots == (Slot(0, 0, 2), Slot(1, 0, 3))
    assert tokens.used == {0, 1}
    assert tokens.weights is None
    assert tokens.ids.shape == (1, 77)


def test_the_first_end_of_text_is_the_prompts_own() -> None:
    """The pooled output is taken there: nothing that holds an embedding's place may be mistaken for it."""
    _, tokens = read("a ink b", INK)
    assert tokens.ids[0].tolist().index(TOKENIZER.eos_token_id) == 6


def rows(tokens: Tokens) -> list[str]:
    """What stands in each chunk between BOS and EOS."""
    return [
        "".join(TOKENIZER.decode([token]) for token in ids[1 : ids.index(TOKENIZER.eos_token_id)])
        for ids in tokens.ids.tolist()
    ]


@pytest.mark.parametrize(("letters", "fits"), [(72, True), (73, False), (75, False)])
def test_an_embedding_is_never_split(letters: int, *, fits: bool) -> None:
    tokens = tokenize(TOKENIZER, "x " * letters + "ink y", [INK])
    assert tokens.slots == (Slot(0, 0, 73) if fits else Slot(0, 1, 1),)
    assert tokens.ids[0, letters + (4 if fits else 1)] == TOKENIZER.eos_token_id
    assert tokens.ids[1].tolist().index(TOKENIZER.eos_token_id) == (2 if fits else 5)


def test_seventy_five_vectors_fill_a_chunk() -> None:
    tokens = tokenize(TOKENIZER, "a ink b", [PromptWord("ink", 75)])
    assert tokens.slots == (Slot(0, 1, 1),)
    assert [row.replace("<|startoftext|>", "") for row in rows(tokens)] == ["a", "", "b"]


@pytest.mark.parametrize(("letters", "chunks"), [(0, 1), (75, 1), (76, 2), (150, 2), (151, 3)])
def test_a_long_prompt_is_parted_every_75_tokens(letters: int, chunks: int) -> None:
    tokens = tokenize(TOKENIZER, "x " * letters)
    assert tokens.ids.shape == (chunks, 77)
    assert (tokens.ids[:, 0] == TOKENIZER.bos_token_id).all()
    assert "".join(rows(tokens)) == "x" * letters


def weighted(prompt: str, *names: PromptWord) -> Tokens:
    return tokenize_weighted(TOKENIZER, parse_attention(prompt), names)


def test_a_break_ends_its_chunk() -> None:
    assert rows(weighted("a BREAK b c")) == ["a", "bc"]
    assert rows(weighted("BREAK a")) == ["", "a"]
    assert rows(weighted("a BREAK BREAK")) == ["a", ""]
    assert rows(weighted("")) == [""]


@pytest.mark.parametrize(("behind", "goes_over"), [(0, False), (19, True), (20, False)])
def test_what_stands_shortly_behind_a_comma_goes_over(behind: int, *, goes_over: bool) -> None:
    """The comma itself is among the 20."""
    filled = "x " * (74 - behind) + "," + "y " * behind
    first, second = rows(weighted(filled + "z"))
    assert (first, second) == (
        ("x" * (74 - behind) + ",", "y" * behind + "z") if goes_over else (filled.replace(" ", ""), "z")
    )
    assert rows(tokenize(TOKENIZER, filled + "z")) == [filled.replace(" ", ""), "z"], (
        "a plain prompt is parted as it is"
    )


def test_an_embedding_behind_a_comma_goes_over_whole() -> None:
    tokens = weighted("x " * 69 + ", ink y y z", INK)
    assert tokens.slots == (Slot(0, 1, 1),)
    assert rows(tokens)[0] == "x" * 69 + ","


def test_every_token_has_the_weight_of_its_word() -> None:
    tokens = weighted("a (ink b:1.5) [c]", INK)
    assert tokens.weights is not None
    assert tokens.weights[0, :8].tolist() == pytest.approx([1, 1, 1.5, 1.5, 1.5, 1.5, 1 / 1.1, 1])
    assert (tokens.weights[0, 8:] == 1).all()


def test_without_emphasis_there_are_no_weights() -> None:
    assert weighted(r"a \(b\), c").weights is None


def test_the_tokenizer_stays_as_it_is() -> None:
    before = TOKENIZER.get_vocab()
    read("a <cat> ink", CAT, INK)
    assert TOKENIZER.get_vocab() == before
