"""Embeddings: layouts, where the token comes from, the record, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scumble.errors import Incompatible, Refused
from scumble_registry import Registry
from scumble_registry.compatibility import TextualInversionCompatibility
from scumble_registry.formats.safetensors_header import Array, write
from scumble_registry.formats.textual_inversion import make_record, read_record

WIDTH = 8  # of the text encoder of the base in conftest.py


def save(path: Path, **tensors: Array) -> Path:
    path.write_bytes(write(tensors, {}))
    return path


def ones(*shape: int) -> Array:
    return np.ones(shape, np.float32)


def published(registry: Registry, file: Path, **options: Any) -> TextualInversionCompatibility:
    compatibility = registry.publish(file, f"e/{len(registry.names())}", **options).manifest.compatibility
    assert isinstance(compatibility, TextualInversionCompatibility)
    return compatibility


@pytest.mark.parametrize(
    ("name", "tensors", "expected"),
    [
        ("learned_embeds", {"<cat-toy>": ones(WIDTH)}, ("<cat-toy>", 1, (WIDTH,))),
        ("learned_embeds", {"<cat-toy>": ones(4, WIDTH)}, ("<cat-toy>", 4, (WIDTH,))),
        ("learned_embeds", {"<lora-cat>": ones(WIDTH)}, ("<lora-cat>", 1, (WIDTH,))),
        ("learned_embeds", {"norm.diff": ones(WIDTH)}, ("norm.diff", 1, (WIDTH,))),
        ("EasyNegative", {"emb_params": ones(8, WIDTH)}, ("EasyNegative", 8, (WIDTH,))),
        ("bad.hands v2", {"clip_l": ones(2, WIDTH)}, ("bad.hands v2", 2, (WIDTH,))),
        ("xl", {"clip_l": ones(2, 768), "clip_g": ones(2, 1280)}, ("xl", 2, (768, 1280))),
    ],
)
def test_layouts_and_their_tokens(
    registry: Registry, tmp_path: Path, name: str, tensors: dict[str, Array], expected: tuple[Any, ...]
) -> None:
    file = save(tmp_path / f"{name}.safetensors", **tensors)
    found = published(registry, file)
    assert (found.token, found.vectors, found.widths) == expected
    assert published(registry, file, trigger_words=["<mine>", "more"]).token == "<mine>"
    assert registry.find("e/0").manifest.trigger_words == (expected[0],)
    assert registry.find("e/1").manifest.trigger_words == ("<mine>", "more")


@pytest.mark.parametrize(("width", "family"), [(768, "sd1"), (1024, "sd2"), (WIDTH, None)])
def test_the_width_says_the_family(registry: Registry, tmp_path: Path, width: int, family: str | None) -> None:
    assert published(registry, save(tmp_path / "a.safetensors", a=ones(width))).family == family


def test_everything_that_a_registry_does(registry: Registry, base: Path, tmp_path: Path) -> None:
    registry.publish(base, "demo/base")
    file = save(tmp_path / "ink.safetensors", emb_params=ones(2, WIDTH))
    version = registry.publish(file, "e/ink", base="demo/base", alias="prod")
    assert registry.publish(file, "e/ink", base="demo/base").version == 1
    assert registry.resolve("e/ink@prod").digest == version.digest
    assert (version.manifest.kind, version.manifest.compatibility.family) == ("textual_inversion", "sd1")
    assert read_record(registry.record_path(version))["text_encoder"].shape == (2, WIDTH)
    registry.pull("e/ink", tmp_path / "out")
    pulled = tmp_path / "out" / "ink.safetensors"
    assert pulled.read_bytes() == file.read_bytes()
    assert registry.publish(pulled, "e/ink", base="demo/base").version == 1, "what was pulled publishes as it was"
    assert registry.verify().versions == 2
    with pytest.raises(Refused, match="of kind textual_inversion"):
        registry.publish(base, "e/ink")


@pytest.mark.parametrize(("token", "inside"), [("a_b", "a_b"), ("<a>", "learned_embeds"), ("../a", "learned_embeds")])
def test_a_file_is_named_by_its_token_where_that_can_name_a_file(
    registry: Registry, tmp_path: Path, token: str, inside: str
) -> None:
    file = save(tmp_path / "x.safetensors", emb_params=ones(WIDTH))
    version = registry.publish(file, "e/x", trigger_words=[token])
    assert list(version.manifest.files) == [f"{inside}.safetensors"]


def test_a_folder_keeps_its_files(registry: Registry, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    save(folder / "ink.safetensors", emb_params=ones(WIDTH))
    (folder / "README.md").write_text("# Ink")
    assert published(registry, folder).token == "ink"
    assert sorted(registry.find("e/0").manifest.files) == ["README.md", "ink.safetensors"]
    (folder / "code.py").write_text("print()")
    with pytest.raises(Refused, match=r"code\.py"):
        registry.publish(folder, "e/0")


def test_another_width_does_not_fit(registry: Registry, base: Path, tmp_path: Path) -> None:
    registry.publish(base, "demo/base")
    with pytest.raises(Incompatible, match="width 9, but the text encoders of this sd1 base have 8") as caught:
        registry.publish(save(tmp_path / "a.safetensors", a=ones(9)), "e/a", base="demo/base")
    assert caught.value.fields == {"adapter_widths": (9,), "base_widths": (8,)}


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"a": ones(76, WIDTH)}, "76 vectors"),
        ({"a": np.full(WIDTH, np.nan, np.float32)}, "NaN"),
        ({"a": np.full(WIDTH, np.inf, np.float16)}, "NaN"),
        ({"a": np.ones(WIDTH, np.int64)}, "I64"),
        ({"a": ones(0, WIDTH)}, "shape"),
        ({"emb_params": ones(1, 1, WIDTH)}, "shape"),
        ({"clip_l": ones(1, WIDTH), "clip_g": ones(2, WIDTH)}, "every text encoder needs the same number"),
        ({" ": ones(WIDTH)}, "token is empty"),
        ({"a": ones(75, 20_000)}, "too large"),
        ({"proj.weight": ones(WIDTH, WIDTH)}, "none of the kinds"),
        ({"a": ones(1, 1, WIDTH)}, "none of the kinds"),
        ({"a": ones(WIDTH), "b": ones(WIDTH)}, "none of the kinds"),
    ],
)
def test_what_is_no_sound_embedding_is_refused(
    registry: Registry, tmp_path: Path, tensors: dict[str, Array], says: str
) -> None:
    with pytest.raises(Refused, match=says):
        registry.publish(save(tmp_path / "x.safetensors", **tensors), "e/x")
    assert registry.names() == ()


@pytest.mark.parametrize("name", ["ink.pt", "learned_embeds.bin"])
def test_a_damaged_pickle_is_refused_with_what_would_be_right(registry: Registry, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(Refused, match=r"as if it were cut off; fetch it again.*Use a safetensors file"):
        registry.publish(tmp_path / name, "e/x")


def test_a_vector_may_come_alone() -> None:
    assert make_record({"text_encoder": ones(WIDTH)})["text_encoder"].shape == (1, WIDTH)


torch = pytest.importorskip("torch")


def pickled(file: Path, content: Any) -> Path:
    torch.save(content, file)
    return file


def webui(*names: str) -> dict[str, Any]:
    return {
        "string_to_token": dict.fromkeys(names, 265),
        "string_to_param": {name: torch.ones(2, WIDTH) for name in names},
        "name": "inside",
        "step": 3,
    }


def test_the_webuis_files_are_called_by_their_files_name(registry: Registry, tmp_path: Path) -> None:
    found = published(registry, pickled(tmp_path / "EasyNegative.pt", webui("*")))
    assert (found.token, found.vectors) == ("EasyNegative", 2)
    registry.pull("e/0", tmp_path / "pulled")
    again = registry.publish(tmp_path / "pulled/EasyNegative.safetensors", "e/0")
    assert again.manifest.record == registry.find("e/0@1").manifest.record


def test_several_embeddings_in_one_file_are_refused(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"2 embeddings \(a, b\)"):
        registry.publish(pickled(tmp_path / "two.pt", webui("a", "b")), "e/x")


def test_a_tensor_alone_must_be_named(registry: Registry, tmp_path: Path) -> None:
    file = pickled(tmp_path / "vectors.pt", torch.ones(2, WIDTH))
    with pytest.raises(Refused, match="--trigger WORD"):
        registry.publish(file, "e/x")
    assert published(registry, file, trigger_words=["ink"]).token == "ink"
    registry.pull("e/0", tmp_path / "pulled")
    again = registry.publish(tmp_path / "pulled/ink.safetensors", "e/0")
    assert again.manifest.record == registry.find("e/0@1").manifest.record
    assert again.manifest.trigger_words == ("ink",)


def test_a_picture_that_may_carry_an_embedding_is_refused_by_name(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(60))
    with pytest.raises(Refused, match="embeddings inside an image file"):
        registry.publish(tmp_path / "a.png", "e/x")


def test_keys_beside_an_embedding_may_be_left_out(registry: Registry, tmp_path: Path) -> None:
    file = save(tmp_path / "a.safetensors", emb_params=ones(2, WIDTH), more=ones(3))
    with pytest.raises(Refused, match="not understood: more"):
        registry.publish(file, "e/x")
    assert registry.publish(file, "e/x", allow_leftover=True).manifest.leftover == ("more",)
