"""Requests checked, and what a client is told of an error: OpenAI's object, with the place of the mistake.

Nothing is accepted and ignored: a field that is not served is refused by its place, such as
`messages[0].content[1].type`, unless it says what is done anyway (`NEUTRAL`). A null is the same as nothing.
"""

import re
from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from polymodal.errors import CheckpointError, EndpointError, PolymodalError
from polymodal.utils.strict import shown

Json: TypeAlias = dict[str, Any]

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
        place = re.match(r"((?:messages|input)\[[\w.\[\]]*): ", str(error))
        code = "context_length_exceeded" if error.code == "too-long" else None
        return RequestError(str(error), place and place[1], code=code)
    if short or type(error).__name__ == "OutOfMemoryError" or _NO_MEMORY in str(error):
        return RequestError(
            "the request needs more memory than there is; give fewer or smaller media, or a shorter text",
            status=503,
            code="out_of_memory",
        )
    return RequestError("the server failed on this request; its log says why", status=500, code="internal_error")


NEUTRAL: Json = {"modalities": ["text"], "tools": [], "store": False}
"""Fields that are not served, with the values that ask for nothing."""


class Checked(BaseModel):
    """A part of a request, which knows its fields."""

    # Strict: neither "5" nor true nor 1.0 is a number of tokens.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def shape_tag(value: Any) -> str | None:
    """Which of two shapes a value has."""
    # Tags stand in the places that pydantic gives of mistakes; in angle brackets none is taken for a key of a request.
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


Request = TypeVar("Request", bound=Checked)


def parse(body: bytes, kind: type[Request]) -> Request:
    """Read a body; the first mistake is told by its place."""
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not JSON ({str(error)[:120]})", code="invalid_json") from None
    if not isinstance(data, dict):
        raise RequestError("the body must be a JSON object, with model and what is asked")
    data = {key: value for key, value in _without_nulls(data).items() if not _asks_nothing(key, value)}
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _mistake(error) from None


def _without_nulls(value: Any) -> Any:
    """The same without keys that say null; the depth is what the parser allows."""
    if isinstance(value, dict):
        schemas = ("schema", "parameters")  # where null is a value
        return {k: v if k in schemas else _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _asks_nothing(key: str, value: Any) -> bool:
    neutral = NEUTRAL.get(key)
    return key in NEUTRAL and value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _place(loc: Sequence[int | str]) -> str:
    """A place in a request, such as `messages[0].content[1].type`."""
    keys = [key for key in loc if isinstance(key, int) or not re.fullmatch(r"<\w+>", key)]
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")


def _mistake(error: ValidationError) -> RequestError:
    """The first mistake that pydantic found."""
    first = error.errors(include_url=False)[0]
    place, given = _place(first["loc"]), first["input"]
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        place = f"{place[: len(place) - len(key)]}{shown(key)[1:-1]}"
        return RequestError(f"{place}: is not served here; leave it out", place, code="unsupported_parameter")
    if first["type"] == "missing":
        return RequestError(f"{place}: is missing", place, code="missing_required_parameter")
    return RequestError(f"{place}: {first['msg']}, not {shown(given)}", place, code="invalid_value")
