"""A server's configuration. Parsed once; the launcher passes it to the Triton stub through the environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, TypeAlias, cast, get_args

from pydantic import BaseModel, ConfigDict, Field

from scumble.errors import InvalidRequest
from scumble_registry import default_home
from scumble_server.logs import LogFormat

ENVIRONMENT_KEY = "SCUMBLE_SERVER_CONFIG"


ExecutorName: TypeAlias = Literal["torch", "onnxruntime", "tensorrt", "tensorrt_rtx"]
EXECUTOR_KEY = "SCUMBLE_EXECUTOR"


def default_executor() -> ExecutorName:
    """`SCUMBLE_EXECUTOR`, or torch. Raises InvalidRequest for a name that is none."""
    named = os.environ.get(EXECUTOR_KEY) or "torch"
    for name in get_args(ExecutorName):
        if name == named:
            return cast("ExecutorName", name)
    known = ", ".join(get_args(ExecutorName))
    raise InvalidRequest(f"{EXECUTOR_KEY} is {named!r}; there are {known}", field="executor")


class ServerConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    home: Path = Field(default_factory=default_home)
    """The embedded registry's folder."""
    base: str
    """Reference of the base that answers requests which name none, e.g. `scumble/demo`."""
    more_bases: tuple[str, ...] = ()
    """References of the others that requests may name."""
    executor: ExecutorName = Field(default_factory=default_executor)
    """If TensorRT has no engine that fits, PyTorch serves instead, and the log gives the reason."""
    build_engines: bool = False
    """Build engines that are missing while starting, which takes minutes to hours."""
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    cuda_graphs: bool = True
    """Capture steps as CUDA graphs. A step that cannot be captured runs without, in any case."""
    compile_steps: bool = False
    """Compile the torch executor's denoiser by torch.compile: quicker steps, minutes for each new structure."""
    png_level: int = Field(default=1, ge=0, le=9)
    """zlib's level of PNGs that requests ask for, 0 (none) to 9: higher ones are smaller and take longer."""
    fused_lora: bool | None = None
    """Add LoRAs with the fused kernel, which needs CUDA and the package `triton`. None: where both are there."""
    max_batch_images: int = Field(default=8, ge=1, le=64)
    """Images that share one step; a guided image is two rows."""
    max_queue: int = Field(default=256, ge=1)
    """Requests that wait; one more is answered with QueueFull."""
    max_pixels: int = Field(default=1024 * 1024, ge=64)
    """Largest width x height of one image."""
    max_rows: int = Field(default=32, ge=2)
    """Rows of one call of the denoiser: larger batches are cut."""
    host_cache_bytes: int = Field(default=1 << 30, ge=0)
    """Host memory for adapters' records, least recently used first out."""
    device_cache_bytes: int = Field(default=2 << 30, ge=0)
    """Device memory for what requests are made of: bound factors, nets, encodings, keys and values."""
    weights_cache_bytes: int = Field(default=16 << 30, ge=0)
    """Device memory for weights: bases, checkpoints, and LoRAs that are too many for factors."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of the executor; None leaves torch's own choice."""

    log_format: LogFormat = "text"
    log_prompts: bool = False
    """Put prompts, and messages that may quote them, into the log's line of each request."""

    def to_env(self) -> dict[str, str]:
        return {ENVIRONMENT_KEY: self.model_dump_json()}

    @classmethod
    def from_env(cls) -> ServerConfig:
        return cls.model_validate_json(os.environ[ENVIRONMENT_KEY])
