"""Structured logs on stderr: readable on a terminal, one JSON object a line elsewhere.

What other libraries log goes the same way. No value of a variable is ever written with a
traceback: it may be a password or a prompt.
"""

from __future__ import annotations

import atexit
import logging
import re
import sys
from typing import Any, TextIO

import structlog
from structlog.processors import ExceptionRenderer
from structlog.tracebacks import ExceptionDictTransformer

from segue_contract.limits import LOG_FLUSH_S, LOG_QUEUE_BYTES
from segue_contract.transport.log_writer import LogWriter
from segue_contract.urls import without_password as without_password

# Keys whose values never reach a log, whoever passes them, at whatever depth.
_SECRET_WORDS = ("password", "passwd", "secret", "token_value", "authorization", "credential",
                 "api_key")  # fmt: skip
_HIDDEN = "(hidden)"
_MAX_DEPTH = 8  # of values within values; deeper ones are written by their type alone
# user and password of an address, in a message that someone else wrote
_IN_ADDRESS = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@\"']*@", re.IGNORECASE)


def _hide_secrets(
    _logger: Any, _method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    return {key: _safe(key, value, 0) for key, value in event.items()}


def _safe(key: object, value: object, depth: int) -> object:
    """`value` as it may be written; `exc_info` and the like pass as they are."""
    if isinstance(key, str) and any(word in key.lower() for word in _SECRET_WORDS):
        return _HIDDEN
    if isinstance(value, str):
        return _IN_ADDRESS.sub(r"\1", value)
    if isinstance(value, dict | list | tuple) and key != "exc_info":
        if depth >= _MAX_DEPTH:
            return f"({type(value).__name__})"
        if isinstance(value, dict):
            return {k: _safe(k, v, depth + 1) for k, v in value.items()}
        return [_safe("", one, depth + 1) for one in value]
    return value


class _LibraryLogs(logging.Handler):
    """What libraries say from `warning` on, as events of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            logger = structlog.get_logger(record.name)
            method = "error" if record.levelno >= logging.ERROR else "warning"
            getattr(logger, method)(
                "library", said=record.getMessage(), exc_info=record.exc_info or None
            )
        except Exception:
            self.handleError(record)


def set_up_logs(level: str = "info", file: TextIO | None = None) -> LogWriter:
    """Configure structlog once per process; returns what writes.

    Args:
        level: debug, info, warning or error.
        file: stderr where not given.
    """
    number = logging.getLevelNamesMapping()[level.upper()]
    writer = LogWriter(file or sys.stderr, LOG_QUEUE_BYTES)
    atexit.register(writer.close, LOG_FLUSH_S)
    last: list[structlog.typing.Processor] = (
        [
            _hide_secrets,
            structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
        ]
        if writer.isatty()
        else [
            ExceptionRenderer(ExceptionDictTransformer(show_locals=False, use_rich=False)),
            _hide_secrets,
            structlog.processors.JSONRenderer(),
        ]
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *last,
            _hide_addresses,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=writer),  # type: ignore[arg-type]
        cache_logger_on_first_use=True,
    )
    root = logging.getLogger()
    root.handlers = [handler for handler in root.handlers if not isinstance(handler, _LibraryLogs)]
    handler = _LibraryLogs(logging.WARNING)
    root.addHandler(handler)
    return writer


def _hide_addresses(_logger: Any, _method: str, line: Any) -> Any:
    """The last word: tracebacks of a terminal are text by now."""
    return _IN_ADDRESS.sub(r"\1", line) if isinstance(line, str) else line
