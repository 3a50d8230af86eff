"""The log of a server's processes: lines of text or of JSON on stderr, which Triton's own log shares."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

LogFormat: TypeAlias = Literal["text", "json"]


def configure(form: LogFormat) -> None:
    """Write all of this process's log to stderr in this form. Call once, at its start."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines() if form == "json" else _TextLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class _TextLines(logging.Formatter):
    """`time level logger: message name=value …`; values are JSON, so that no text of a stranger begins a line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={json.dumps(value)}" for name, value in _fields(record).items())
        head = f"{_time(record)} {record.levelname} {record.name}: {record.getMessage()}{fields}"
        return f"{head}\n{self.formatException(record.exc_info)}" if record.exc_info else head


class _JsonLines(logging.Formatter):
    """One object a line, the record's fields beside its time, level, logger and message."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    """What `extra={"fields": …}` brought."""
    return getattr(record, "fields", {})


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
