from __future__ import annotations

import pytest

from scumble.errors import InvalidRequest
from scumble_registry.sources import HubSource, WebSource, parse_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("hf:ann/ink", HubSource("ann/ink")),
        ("hf:ann/ink@v1.0", HubSource("ann/ink", "v1.0")),
        (f"hf:ann/ink@{COMMIT}/sub/a b@2.safetensors", HubSource("ann/ink", COMMIT, "sub/a b@2.safetensors")),
        ("hf:ann/ink/sub/", HubSource("ann/ink", None, "sub")),
        ("hf:ann/ink@refs%2Fpr%2F3", HubSource("ann/ink", "refs/pr/3")),
        ("https://huggingface.co/ann/ink", HubSource("ann/ink")),
        ("https://hf.co/ann/ink/tree/main/sub", HubSource("ann/ink", "main", "sub")),
        ("https://huggingface.co/ann/ink/resolve/main/a%20b.pt?download=true", HubSource("ann/ink", "main", "a b.pt")),
        ("https://huggingface.co/datasets/ann/ink", WebSource("https://huggingface.co/datasets/ann/ink")),
        ("https://example.org/a?b=c", WebSource("https://example.org/a?b=c")),
        (
            "https://civitai.com/models/5/ink?modelVersionId=77",
            WebSource("https://civitai.com/api/download/models/77"),
        ),
        (
            "https://civitai.com/api/download/models/77?type=Model",
            WebSource("https://civitai.com/api/download/models/77?type=Model"),
        ),
    ],
)
def test_sources_are_read_as_people_copy_them(text: str, source: object) -> None:
    assert parse_source(text) == source


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ink.safetensors", "scumble registry publish"),
        ("http://example.org/a", "plain http"),
        ("ftp://example.org/a", "is not a source"),
        ("file:///etc/passwd", "is not a source"),
        ("hf:ann/ink/a//b", "is not a path inside a repository"),
        ("https://civitai.com/models/5", "modelVersionId"),
        ("https://civitai.com/models/5/ink?modelVersionId=7/../8", "modelVersionId"),
    ],
)
def test_what_is_no_source_is_an_invalid_request(text: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        parse_source(text)


def test_a_secret_in_what_is_no_source_is_not_repeated() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_source("http://ann:pass@example.org/a?token=secret")
    assert "pass" not in caught.value.message
    assert "secret" not in caught.value.message
