"""Imports from a stand-in of the Hub's HTTP interface, through huggingface_hub itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from scumble.errors import IntegrityError, InvalidRequest, NotFound, Refused, ScumbleError, Unavailable
from scumble_registry import Registry
from scumble_registry.importing import import_from
from support.stand_ins import Hub, serving, sha256

LoraWriter = Callable[..., Path]
WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))


@contextmanager
def at(hub: Hub) -> Iterator[Hub]:
    with serving(hub) as port, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        yield hub


@pytest.fixture
def hub(lora: Path) -> Hub:
    files = {WEIGHTS: lora.read_bytes(), "README.md": b"# Ink", "grid.png": b"\x89PNG", "README": b"x"}
    return Hub(files, lfs={WEIGHTS, "grid.png"}, card={"license": "mit"})


def test_a_repository_s_only_weights_are_fetched_and_published_with_where_they_came_from(
    registry: Registry, hub: Hub, lora: Path
) -> None:
    with at(hub):
        version = import_from(registry, "hf:ann/ink", "styles/ink", alias="prod")
    assert hub.served == [WEIGHTS]
    manifest = version.manifest
    assert manifest.files == registry.publish(lora, "plain/ink").manifest.files
    assert manifest.license == "mit"
    assert manifest.provenance["source"] == {
        "url": f"https://huggingface.co/ann/ink/resolve/{hub.commit}/{WEIGHTS}",
        "repository": "ann/ink",
        "commit": hub.commit,
        "file": WEIGHTS,
        "sha256": sha256(lora.read_bytes()),
    }
    assert registry.resolve("styles/ink@prod") == version


@pytest.mark.parametrize(
    "source",
    [
        "hf:ann/ink@main",
        "hf:ann/ink@refs%2Fpr%2F1/" + WEIGHTS,
        "https://huggingface.co/ann/ink",
        "https://huggingface.co/ann/ink/blob/main/" + WEIGHTS + "?download=true",
        "https://huggingface.co/ann/ink/resolve/refs%2Fpr%2F1/" + WEIGHTS,
    ],
)
def test_every_spelling_of_one_commit_is_the_same_version(registry: Registry, hub: Hub, source: str) -> None:
    hub.files.pop("README")
    with at(hub):
        first = import_from(registry, "hf:ann/ink@" + hub.commit, "styles/ink")
        if "refs%2Fpr%2F1/" in source and source.startswith("https"):
            source = source.replace("refs%2Fpr%2F1", "main")
        assert import_from(registry, source, "styles/ink") == first


def test_one_file_of_many_and_the_publisher_s_own_words(registry: Registry, hub: Hub, write_lora: LoraWriter) -> None:
    other = write_lora("other.safetensors", seed=5)
    hub.files["sub/other.safetensors"] = other.read_bytes()
    with at(hub):
        with pytest.raises(InvalidRequest, match=r"2 files of weights.*sub/other\.safetensors"):
            import_from(registry, "hf:ann/ink", "styles/ink")
        version = import_from(
            registry, "hf:ann/ink/sub/other.safetensors", "styles/ink", license="CC0-1.0", provenance={"seed": 5}
        )
    assert version.manifest.license == "CC0-1.0"
    assert version.manifest.provenance["seed"] == 5
    assert registry.find_hash(sha256(other.read_bytes())[:10])[0].version == version


def test_a_base_s_folder_comes_whole_and_nothing_beside_it(registry: Registry, base: Path, hub: Hub) -> None:
    folder = {file.relative_to(base).as_posix(): file.read_bytes() for file in base.rglob("*") if file.is_file()}
    extra = {
        "unet/diffusion_pytorch_model.fp16.safetensors": b"half",
        "unet/diffusion_pytorch_model.bin": b"pickle",
        "model.ckpt": b"pickle",
        "pictures/one.png": b"\x89PNG",
        ".gitattributes": b"",
    }
    hub.files, hub.lfs = folder | extra, {name for name in folder if name.endswith(".safetensors")}
    with at(hub):
        version = import_from(registry, "hf:ann/ink", "demo/base")
    assert sorted(hub.served) == sorted(folder)
    assert version.manifest.files == registry.publish(base, "plain/base").manifest.files
    source = version.manifest.provenance["source"]
    assert isinstance(source, dict)
    assert source["url"] == f"https://huggingface.co/ann/ink/tree/{hub.commit}"


def test_include_chooses(registry: Registry, hub: Hub, write_lora: LoraWriter) -> None:
    hub.files["two.safetensors"] = write_lora(seed=2).read_bytes()
    with at(hub):
        import_from(registry, "hf:ann/ink", "styles/ink", include=["two.*"])
        assert hub.served == ["two.safetensors"]
        with pytest.raises(NotFound, match=r"nothing matches \*\.bin"):
            import_from(registry, "hf:ann/ink", "styles/ink", include=["*.bin"])


def test_what_is_too_large_is_refused_before_a_byte_is_fetched(registry: Registry, hub: Hub) -> None:
    with at(hub), pytest.raises(Refused, match="--max-size"):
        import_from(registry, "hf:ann/ink", "styles/ink", max_bytes=10)
    assert hub.served == []


def test_what_is_too_large_and_does_not_say_so_is_refused_when_it_has_come(registry: Registry, hub: Hub) -> None:
    hub.says_no_sizes = True
    with at(hub), pytest.raises(Refused, match="--max-size"):
        import_from(registry, "hf:ann/ink", "styles/ink", max_bytes=10)
    assert registry.names() == ()


def test_names_that_lead_out_of_the_folder_are_not_taken(registry: Registry, hub: Hub, home: Path) -> None:
    hub.files["../../evil.safetensors"] = hub.files[WEIGHTS]
    with at(hub):
        import_from(registry, "hf:ann/ink", "styles/ink")
        with pytest.raises(NotFound, match="nothing matches"):
            import_from(registry, "hf:ann/ink", "styles/ink", include=["*evil*"])
    assert not list(home.parent.rglob("evil*"))


def test_bytes_that_are_not_those_of_the_commit_are_not_published(registry: Registry, hub: Hub, home: Path) -> None:
    hub.wrong.add(WEIGHTS)
    with at(hub), pytest.raises(IntegrityError, match="came with sha256"):
        import_from(registry, "hf:ann/ink", "styles/ink")
    assert registry.names() == ()
    assert list((home / "registry/tmp").iterdir()) == []


def test_a_digest_that_one_expects_is_checked(registry: Registry, hub: Hub, lora: Path) -> None:
    with at(hub):
        with pytest.raises(IntegrityError, match="check the URL and the digest"):
            import_from(registry, "hf:ann/ink", "styles/ink", sha256="0" * 64)
        import_from(registry, "hf:ann/ink", "styles/ink", sha256=sha256(lora.read_bytes()).upper())


def test_a_private_repository_wants_the_environment_s_token_and_no_other_host_sees_it(
    registry: Registry, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "hf_secret"
    with at(hub):
        with pytest.raises(NotFound, match="HF_TOKEN"):
            import_from(registry, "hf:ann/ink", "styles/ink")
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        version = import_from(registry, "hf:ann/ink", "styles/ink")
    assert set(hub.tokens_at_storage) == {None}
    assert b"hf_secret" not in version.manifest.canonical()


def test_a_gated_repository_says_what_to_do(registry: Registry, hub: Hub) -> None:
    hub.token, hub.gated = "hf_secret", True
    with at(hub), pytest.raises(Refused, match="accept its conditions"):
        import_from(registry, "hf:ann/ink", "styles/ink")


@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        ("hf:ann/oil", NotFound, "no repository ann/oil"),
        ("hf:ann/ink@v9", NotFound, "no revision v9"),
        ("hf:ann/ink/nothing.safetensors", NotFound, "no 'nothing.safetensors'"),
        ("hf:ann/ink/../x", InvalidRequest, "is not a path inside a repository"),
        ("hf:ink", InvalidRequest, "is not a repository"),
        ("hf:an n/ink", InvalidRequest, "is not a repository"),
        ("hf:-ann/ink--x", InvalidRequest, "is not the name of a repository"),
    ],
)
def test_what_is_not_there_is_named(
    registry: Registry, hub: Hub, source: str, error: type[ScumbleError], says: str
) -> None:
    with at(hub), pytest.raises(error, match=says):
        import_from(registry, source, "styles/ink")


def test_a_hub_that_does_not_answer_is_unavailable(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Unavailable, match="could not be fetched"):
        import_from(registry, "hf:ann/ink", "styles/ink")


def test_a_base_that_is_not_here_is_said_before_anything_is_fetched(registry: Registry, hub: Hub) -> None:
    with at(hub), pytest.raises(NotFound, match="demo/base"):
        import_from(registry, "hf:ann/ink", "styles/ink", base="demo/base")
    assert hub.served == []
