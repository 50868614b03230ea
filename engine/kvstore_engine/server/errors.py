"""Errors of the HTTP API, in the JSON shape that OpenAI clients know."""

import logging

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

log = logging.getLogger(__name__)


class ApiError(Exception):
    """An answer other than success: HTTP status, message, and the field at fault if one is."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param

    def body(self) -> dict[str, object]:
        """The ``error`` object, also sent as an event where a stream has begun."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The HTTP response."""
        headers = {"retry-after": "1"} if self.status in (429, 503) else None
        return JSONResponse(self.body(), self.status, headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request can never succeed as it is."""
    return ApiError(400, message, code=code, param=param)


async def _on_api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    reasons = {404: "there is no such endpoint", 405: "this endpoint takes another method"}
    message = f"{where}: {reasons.get(error.status_code, error.detail)}"
    answer = ApiError(error.status_code, message).response()
    answer.headers.update(error.headers or {})
    return answer


async def _on_bug(_request: Request, _error: Exception) -> Response:
    """The web framework logs the traceback; the client only learns that there was one."""
    return ApiError(500, "internal error; the server's log has the details").response()


def install_error_handlers(app: FastAPI) -> None:
    """Every error leaves the server as an OpenAI error object."""
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_bug)
