from __future__ import annotations

import re
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scumble.errors import InvalidRequest
from scumble_registry import Reference, parse

DIGEST = "sha256:" + "0123456789abcdef" * 4
PARTS = st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?", fullmatch=True)
NAMES = st.builds("{}/{}".format, PARTS, PARTS)
REFERENCES = st.one_of(
    st.builds(Reference, NAMES),
    st.builds(Reference, NAMES, version=st.integers(1, 999_999_999)),
    st.builds(Reference, NAMES, alias=PARTS.filter(lambda text: not text.isdigit())),
    st.builds(Reference, NAMES, digest=st.from_regex(r"sha256:[0-9a-f]{64}", fullmatch=True)),
)


@given(REFERENCES)
def test_a_reference_survives_being_written_and_read(reference: Reference) -> None:
    assert parse(str(reference)) == reference


@given(st.text(max_size=40))
def test_any_text_is_a_reference_with_one_spelling_or_an_invalid_request(text: str) -> None:
    with suppress(InvalidRequest):
        assert str(parse(text)) == text


def test_each_form_is_read_as_what_it_is() -> None:
    assert parse("styles/ink") == Reference("styles/ink")
    assert parse("styles/ink@7") == Reference("styles/ink", version=7)
    assert parse("styles/ink@prod") == Reference("styles/ink", alias="prod")
    assert parse(f"styles/ink@{DIGEST}") == Reference("styles/ink", digest=DIGEST)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "write ns/name"),
        ("ink", "write ns/name"),
        ("a/b/c", "write ns/name"),
        ("/ink", "may not be part of a name"),
        ("styles/", "may not be part of a name"),
        ("Styles/ink", "lower-case"),
        ("styles/ink ", "may not be part of a name"),
        ("styles/../x", "write ns/name"),
        ("styles/..", "may not be part of a name"),
        ("styles/ink@", "neither a version"),
        ("styles/ink@0", "versions are 1, 2, 3"),
        ("styles/ink@007", "versions are 1, 2, 3"),
        ("styles/ink@99999999999999999999", "versions are 1, 2, 3"),
        ("styles/ink@-1", "neither a version"),
        ("styles/ink@1@2", "neither a version"),
        ("styles/ink@md5:aa", "neither a version"),
        ("styles/ink@sha256:abc", "all 64"),
        (f"styles/ink@{DIGEST.upper()}", "neither a version"),
        ("styles/ink@٣", "neither a version"),
        ("styles/ínk", "may not be part of a name"),
        (f"styles/{'a' * 65}", "at most 64"),
    ],
)
def test_a_malformed_reference_is_refused_with_what_would_be_right(text: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(says)):
        parse(text)
