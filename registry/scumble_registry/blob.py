"""A stored file as a manifest names it: its sha256 and its size."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Blob(BaseModel):
    """The sha256 (`digest`) and the size in bytes of a stored file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")
    size: int = Field(ge=0)

    @property
    def hex(self) -> str:
        return self.digest.removeprefix("sha256:")
