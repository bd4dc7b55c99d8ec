"""What went wrong in, an answer of RFC 9457 (application/problem+json) out; it never holds a traceback, a token or a stored value."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

__all__ = ["MEDIA_TYPE", "Problem", "problem"]

MEDIA_TYPE = "application/problem+json"
#: What a client should wait before it tries again, in seconds.
RETRY_AFTER = "1"
#: Statuses after which trying again is worth while.
TRANSIENT = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)


class Problem(Exception):
    """A request ends here. ``reason``: a word for metrics, where the server refuses because of itself and not of the request."""

    def __init__(self, status: int, detail: str, reason: str = "") -> None:
        super().__init__(status, detail, reason)
        self.status, self.detail, self.reason = status, detail, reason


def problem(status: int, detail: str, *, headers: dict[str, str] | None = None, **more: Any) -> Response:
    """The answer; *more*: members of its own."""
    told = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail, **more}
    added = dict(headers or {})
    if status in TRANSIENT:
        added["retry-after"] = RETRY_AFTER
    if status == HTTPStatus.UNAUTHORIZED:
        added["www-authenticate"] = "Bearer"
    return Response(json.dumps(told), status, added, MEDIA_TYPE)
