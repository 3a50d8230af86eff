"""A client, and the scripted server that it talks to."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from hypothesis import HealthCheck, settings
from tritonclient.grpc import service_pb2_grpc

from scumble.client import Client
from support.scripted_server import ScriptedServer

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")  # a busy machine is no failure


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    scripted = ScriptedServer()
    grpc_server = grpc.server(ThreadPoolExecutor(32))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(scripted, grpc_server)
    scripted.port = grpc_server.add_insecure_port("127.0.0.1:0")
    grpc_server.start()
    yield scripted
    grpc_server.stop(0).wait()


@pytest.fixture
def client(server: ScriptedServer) -> Iterator[Client]:
    with Client(f"127.0.0.1:{server.port}", timeout=20) as client:
        yield client
