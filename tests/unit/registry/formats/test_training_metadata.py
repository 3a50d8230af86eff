from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from scumble_registry.formats.training_metadata import for_manifest, frequent_tags, read
from scumble_registry.manifest import canonical_json

LoraWriter = Callable[..., Path]
KOHYA = {
    "ss_network_dim": "16",
    "ss_network_alpha": "8.0",
    "ss_base_model_version": "sd_v1",
    "ss_vae_name": "None",
    "ss_sd_model_name": "None",
    "ss_dataset_dirs": '{"/home/ann/pictures": {}}',
    "ss_tag_frequency": json.dumps({"10_ink": {"ink": 12, "boat": 3}, "5_more": {"boat": 4}}),
    "modelspec.title": "Ink",
    "modelspec.thumbnail": "data:image/jpeg;base64," + "A" * 100_000,
    "something": "else",
}


def of(write_lora: LoraWriter, metadata: dict[str, str]) -> dict[str, object]:
    return read({"a.safetensors": write_lora(metadata=metadata)})


def test_what_trainers_write_is_read_and_pictures_are_not(write_lora: LoraWriter) -> None:
    found = of(write_lora, KOHYA)
    assert found["ss_network_dim"] == "16"
    assert found["ss_tag_frequency"] == {"ink": 12, "boat": 7}
    assert not {"modelspec.thumbnail", "something"} & found.keys()


def test_a_manifest_keeps_what_people_look_for_and_no_paths(write_lora: LoraWriter) -> None:
    found = for_manifest(of(write_lora, KOHYA))
    assert found == {
        "modelspec.title": "Ink",
        "ss_base_model_version": "sd_v1",
        "ss_network_alpha": "8.0",
        "ss_network_dim": "16",
        "ss_tag_frequency": {"ink": 12, "boat": 7},
    }


def test_long_texts_are_cut(write_lora: LoraWriter) -> None:
    found = of(write_lora, {"ss_network_args": "x" * 10_000})
    assert len(str(found["ss_network_args"])) == 2001
    assert len(for_manifest(found)["ss_network_args"]) == 300


def test_a_file_without_metadata_and_a_model_of_many_files_say_nothing(write_lora: LoraWriter, base: Path) -> None:
    assert of(write_lora, {}) == {}
    assert read({str(file): file for file in base.rglob("*.safetensors")}) == {}
    assert read({"vocab.json": base / "tokenizer/vocab.json"}) == {}


def test_half_a_character_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "half.safetensors"
    header = b'{"__metadata__": {"modelspec.title": "a\\ud800", "ss_tag_frequency": "{\\"f\\": {\\"\\\\ud800\\": 1}}"}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    found = read({"half.safetensors": file})
    assert found == {"modelspec.title": "a?", "ss_tag_frequency": {"?": 1}}
    canonical_json(found)


@given(
    st.recursive(st.none() | st.integers() | st.text(), lambda each: st.lists(each) | st.dictionaries(st.text(), each))
)
def test_whatever_stands_in_the_tags_gives_counts_or_nothing(data: object) -> None:
    found = frequent_tags(json.dumps(data))
    assert all(isinstance(tag, str) and count > 0 for tag, count in found.items())
    canonical_json(found)


def test_tags_that_are_no_json_are_none() -> None:
    assert frequent_tags("{") == {} == frequent_tags("[" * 100_000)
