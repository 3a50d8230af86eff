"""A real server over the tiny base, shared by all end-to-end tests that leave it as they found it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scumble import Client
from scumble_registry import Registry
from scumble_server.config import ServerConfig
from scumble_server.triton.launcher import Ports
from scumble_server.triton.running import RunningServer, running_server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def home(tiny_base: Path, make_lora: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SCUMBLE_HOME: `tiny/base` with LoRAs `l/a`, `l/b`, an IP-Adapter and a ControlNet; `tiny/xl`, an SDXL base."""
    from support.control_nets import load_unet, make_net
    from support.tiny_families import make_tiny_sdxl
    from support.tiny_ip import make_image_encoder, make_ip_adapter

    folder = tmp_path_factory.mktemp("e2e-home")
    with Registry.open(folder, create=True) as registry:
        registry.publish(tiny_base, name="tiny/base")
        registry.publish(make_tiny_sdxl(tmp_path_factory.mktemp("xl") / "base"), name="tiny/xl")
        for seed, name in enumerate(("l/a", "l/b"), start=1):
            file = make_lora(tiny_base, tmp_path_factory.mktemp("lora"), seed=seed)
            registry.publish(file, name=name, base="tiny/base")
        looking = tmp_path_factory.mktemp("looking")
        make_image_encoder(looking / "ip" / "image_encoder")
        make_ip_adapter(tiny_base, looking / "ip" / "ip_adapter.safetensors", "base", gain=3.0)
        make_net(load_unet(tiny_base), 1).save_pretrained(looking / "net")
        registry.publish(looking / "ip", name="ip/base", base="tiny/base")
        registry.publish(looking / "net", name="c/net", base="tiny/base")
    return folder


@pytest.fixture(scope="session")
def config(home: Path) -> ServerConfig:
    return ServerConfig(home=home, base="tiny/base", threads=1, max_queue=16)


@pytest.fixture(scope="session")
def server(config: ServerConfig) -> Iterator[RunningServer]:
    with running_server(config, start_timeout=300, ports=Ports(http=0)) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.grpc_url, timeout=60) as connected:
        yield connected
