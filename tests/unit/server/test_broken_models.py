"""Models that were published before they were compared with their configs: each failure names its version."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from scumble.errors import Refused
from scumble.request import Request
from scumble_registry import Registry
from support import control_nets
from support.broken_models import edit_tensors, unchecked, without
from support.running import Running
from support.tiny_ip import make_image_encoder, make_ip_adapter
from support.tiny_variant import make_checkpoint

FILE = "diffusion_pytorch_model.safetensors"
FC1 = "vision_model.encoder.layers.0.mlp.fc1.weight"
NORM = "conv_norm_out.weight"


@pytest.fixture(scope="module")
def running(
    tiny_base: Path, start: Callable[..., Running], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    home, files = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("files")
    encoder = make_image_encoder(files / "encoder")
    edit_tensors(encoder / "model.safetensors", lambda tensors: tensors.pop(FC1))
    net = files / "net"
    control_nets.make_net(control_nets.load_unet(tiny_base), 1).save_pretrained(net)
    edit_tensors(net / FILE, lambda tensors: tensors.pop("controlnet_mid_block.bias"))
    checkpoint = make_checkpoint(tiny_base, files / "checkpoint", seed=1)
    edit_tensors(checkpoint / "unet" / FILE, lambda tensors: tensors.pop(NORM))
    vae = without(tiny_base / "vae", files / "vae", FILE, "decoder.conv_out.bias")
    adapter = make_ip_adapter(tiny_base, files / "ip.safetensors", "base")
    with Registry.open(home, create=True) as registry, unchecked():
        registry.publish(tiny_base, "tiny/base")
        registry.publish(encoder, "broken/encoder")
        registry.publish(adapter, "broken/ip", base="tiny/base", image_encoder="broken/encoder")
        registry.publish(net, "broken/net", base="tiny/base")
        registry.publish(checkpoint, "broken/checkpoint", base="tiny/base")
        registry.publish(vae, "broken/vae")
    started = start(home, "tiny/base", {})
    yield started
    started.service.close()


ASKED: dict[str, tuple[dict[str, Any], str]] = {
    "encoder": ({"adapters": [{"ref": "broken/ip", "images": ["picture"]}]}, FC1),
    "net": ({"adapters": [{"ref": "broken/net", "images": ["picture"]}]}, "controlnet_mid_block.bias"),
    "checkpoint": ({"adapters": [{"ref": "broken/checkpoint"}]}, NORM),
    "vae": ({"options": {"vae": "broken/vae"}}, "decoder.conv_out.bias"),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_is_not_whole_is_refused_with_its_version_and_its_tensor(running: Running, name: str) -> None:
    asked, tensor = ASKED[name]
    with Registry.open(running.home) as registry:
        digest = registry.resolve(f"broken/{name}").digest
    out = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(out, "PNG")
    plain = {"prompt": "a tree", "seed": 1, "steps": 1, "width": 64, "height": 64}
    images = {"picture": out.getvalue()} if "adapters" in asked and name != "checkpoint" else {}
    says = rf"broken/{name}@1 \({digest}\) cannot be loaded.*{re.escape(tensor)}"
    with pytest.raises(Refused, match=f"(?s){says}"):
        running.run([Request.parse(plain | asked | {"images": images})])
    assert running.run([Request.parse(plain)])[0].done.images.shape == (1, 64, 64, 3)
