"""What a manifest says of a file: its sha256 and its size."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Blob(BaseModel):
    """What a manifest says of some bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")
    size: int = Field(ge=0)

    @property
    def hex(self) -> str:
        return self.digest.removeprefix("sha256:")
