"""What a client is told of an error: OpenAI's object."""

import re
from typing import Any

from polymodal.errors import CheckpointError, EndpointError, PolymodalError

TYPES = {400: "invalid_request_error", 429: "rate_limit_error", 500: "server_error"}
_NO_MEMORY = "can't allocate memory"  # torch's words on a CPU


class RequestError(PolymodalError):
    """A request that is refused, or that came to nothing, as OpenAI's error objects say it."""

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None, retry: int = 0
    ) -> None:
        super().__init__(message)
        self.param, self.status, self.reason = param, status, code
        self.retry = retry  # Seconds after which to try again; 0 where that is no use

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = TYPES.get(self.status) or TYPES[500 if self.status >= 500 else 400]
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.reason}}


def as_request_error(error: BaseException) -> RequestError:
    """What a client is told of an error; of one that is none of ours, and may say anything, only that it was one."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, EndpointError):  # which may say where the endpoint is
        told = "the endpoint behind this server gave no answer; the server's log says why"
        return RequestError(told, status=502, code="upstream_error")
    short = isinstance(error, MemoryError) or isinstance(error.__context__, MemoryError)  # a decoder's, of a file
    if not short and isinstance(error, PolymodalError) and not isinstance(error, CheckpointError):
        place = re.match(r"(messages\[[\w.\[\]]*): ", str(error))
        code = "context_length_exceeded" if error.code == "too-long" else None
        return RequestError(str(error), place and place[1], code=code)
    if short or type(error).__name__ == "OutOfMemoryError" or _NO_MEMORY in str(error):
        return RequestError(
            "the request needs more memory than there is; give fewer or smaller media, or a shorter text",
            status=503,
            code="out_of_memory",
        )
    return RequestError("the server failed on this request; its log says why", status=500, code="internal_error")
