"""The log of every room, on stderr: standard output belongs to what a command was asked for. As text for people, or JSON, one object a line.

A line that is about a request has its id (REQUEST_ID, or `extra={"request_id": ...}`). `extra={"fields": {...}}` are the line's figures, which JSON
shows by their names.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any

from server.config import LogFormat
from server.types import REQUEST_ID


def set_up_logging(verbose: bool, log_format: LogFormat = "text") -> None:
    """INFO and above, DEBUG when verbose; libraries speak up from WARNING on."""
    handler = logging.StreamHandler()
    handler.setFormatter(TextFormatter() if log_format == "text" else JsonFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("server").setLevel(logging.DEBUG if verbose else logging.INFO)


class TextFormatter(logging.Formatter):
    """12:00:00 INFO    server.api.access: [request id] message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without a traceback."""
        if request_id := _request_id(record):
            record.message = f"[{request_id}] {record.message}"
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """{"time": ISO 8601 in UTC, "level", "logger", "message"}, and where there is one: request_id, traceback, the line's figures."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "request_id": _request_id(record),
            "message": record.getMessage(),
            "traceback": self.formatException(record.exc_info) if record.exc_info else None,
            **getattr(record, "fields", {}),
        }
        return json.dumps({key: value for key, value in line.items() if value is not None}, ensure_ascii=False, default=str)


def _request_id(record: logging.LogRecord) -> str | None:
    return getattr(record, "request_id", None) or REQUEST_ID.get()
