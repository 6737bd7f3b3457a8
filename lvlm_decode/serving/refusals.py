"""What a client is told when a request is not answered: a status, one sentence, and the field it is about."""

from __future__ import annotations

from typing import Any

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class Refused(Exception):
    """A request that is not answered.

    Args:
        status: HTTP status.
        message: one sentence for the client.
        field: of the request that is to blame.
        code: OpenAI's word for it, where there is one.
    """

    def __init__(self, status: int, message: str, field: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.field, self.code = status, message, field, code

    def body(self) -> dict[str, Any]:
        """The answer, in OpenAI's shape."""
        kind = _KINDS.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.field, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Of the answer: when to come again, or how to say who one is."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": "1"} if self.status in (429, 503) else {}
