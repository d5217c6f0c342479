"""`/v1/responses`, of which nothing is kept: input items to a conversation, an answer to items and events."""

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag

from polymodal.backends.base import Reply, StreamEvent, TextDelta
from polymodal.messages import Message
from polymodal.serving.answers import CallSplit, logprobs, usage_of
from polymodal.serving.errors import Checked, Json, RequestError, parse, shape_tag
from polymodal.serving.models import Served, model_of
from polymodal.serving.protocol import (
    File,
    RequestPart,
    Sampling,
    Sound,
    StreamOptions,
    Turn,
    Url,
    messages_of,
    params_of,
)
from polymodal.serving.streams import Answer, data, route
from polymodal.serving.tools import (
    MAX_TOOLS,
    Call,
    Called,
    ForcedCall,
    Format,
    Function,
    Name,
    Named,
    Schema,
    Tool,
    calling_of,
    following,
    with_tools,
)  # fmt: skip

LOGPROBS = "message.output_text.logprobs"


class _Part(Checked):
    type: Literal["input_text", "output_text", "input_image", "input_audio", "input_file"]
    text: str | None = None
    image_url: str | None = None
    detail: Literal["auto"] = "auto"
    input_audio: Sound | None = None
    file_data: str | None = None
    filename: str = Field("", max_length=255)
    annotations: list[Json] = Field([])  # of an earlier answer, as is the next one
    logprobs: list[Json] = Field([])


_Content: TypeAlias = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[Annotated[list[_Part], Field(min_length=1)], Tag("<list>")],
    Discriminator(shape_tag, custom_error_type="content", custom_error_message="must be a text or a list of parts"),
]


class _Item(Checked):
    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: _Content | None = None
    call_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    name: Name | None = None
    arguments: str | None = None
    output: _Content | None = None
    id: Annotated[str, Field(max_length=256)] | None = None  # as an earlier answer has it, as is the next one
    status: Literal["in_progress", "completed", "incomplete"] | None = None


_FIELDS = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
}
_VALUES = {"input_text": "text", "output_text": "text", "input_image": "image_url", "input_audio": "input_audio",
           "input_file": "file_data"}  # fmt: skip
"""The field of a part that its type needs."""


class _Tool(Checked):
    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: Json | None = None
    strict: bool = False


class _Choice(Named):
    type: Literal["function"]


class _Format(Checked):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Name | None = None
    description: str | None = None
    schema_: Json | None = Field(None, alias="schema")
    strict: bool | None = None


class _Text(Checked):
    format: _Format = Field(default_factory=lambda: _Format.model_validate({}))


class _Request(Sampling):
    input: Annotated[
        Annotated[str, Tag("<text>")]
        | Annotated[Annotated[list[_Item], Field(min_length=1, max_length=1024)], Tag("<list>")],
        Discriminator(shape_tag, custom_error_type="input", custom_error_message="must be a text or a list of items"),
    ]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    text: _Text = _Text()
    tools: list[_Tool] = Field([], max_length=MAX_TOOLS)
    tool_choice: Annotated[
        Annotated[Literal["none", "auto", "required"], Tag("<word>")] | Annotated[_Choice, Tag("<function>")],
        Discriminator(lambda value: "<function>" if isinstance(value, dict) else "<word>"),
    ] = "auto"
    parallel_tool_calls: bool = True
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: list[Literal["message.output_text.logprobs"]] = Field([])
    truncation: Literal["disabled"] = "disabled"
    background: Literal[False] = False
    stream_options: StreamOptions | None = None


class ResponseAnswer(Answer):
    """An answer of the Responses API."""

    def __init__(self, request: _Request, served: Served) -> None:
        tools = [
            Tool(type="function", function=Function(**tool.model_dump(exclude={"type"}))) for tool in request.tools
        ]
        choice: Any = request.tool_choice
        if isinstance(choice, _Choice):
            choice = ForcedCall(type="function", function=Named(name=choice.name))
        self.calling = calling_of(tools, choice, request.parallel_tool_calls, served.backend, inner="")
        self.messages = with_tools(_conversation(request, served), self.calling, served.max_chars)
        more = {"logprobs": (request.top_logprobs or 0) if LOGPROBS in request.include else None}
        if request.top_logprobs and not request.include:
            raise RequestError(f"top_logprobs: only goes with include {LOGPROBS!r}", "top_logprobs")
        more |= following(_format(request.text.format), self.calling, "text.format")
        self.params = params_of(request, served, "max_output_tokens", request.max_output_tokens, more, "text.format")
        super().__init__(served, [(self.messages, [self.params])], request.stream, request.cache_salt)
        self.request = request
        self.head = {"id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time())}
        self.number = 0  # of the next event
        self.split = CallSplit(self.calling)
        self.item: Json | None = None  # The message that is being made
        self.said, self.told = "", list[Json]()

    def whole(self, replies: Sequence[Reply]) -> Json:
        """All of it."""
        (reply,) = replies
        text, calls = self.calling.read(reply.text) if self.calling else (reply.text, [])
        status = "completed" if reply.finish_reason == "stop" or calls else "incomplete"
        output = [_message(_id("msg"), text, self._logprobs(reply.chances), status)] if text or not calls else []
        return self._response(status, [*output, *map(_call, calls)], reply)

    def first(self) -> Iterator[bytes]:
        """That it was taken, and that it is being made."""
        for name in ("response.created", "response.in_progress"):
            yield self._event(name, response=self._response("in_progress", []))

    def pieces(self, index: int, event: StreamEvent) -> Iterator[bytes]:
        """The message as it comes."""
        if isinstance(event, TextDelta):
            yield from self._say(self.split.push(event.text), self._logprobs(event.chances))

    def last(self, replies: Sequence[Reply]) -> Iterator[bytes]:
        """The rest of the message, the calls, and all of it once more."""
        (reply,) = replies
        text, calls = self.split.end()
        yield from self._say(text, [])
        if self.item is None and not calls:
            yield from self._begin()
        status = "completed" if reply.finish_reason == "stop" or calls else "incomplete"
        output: list[Json] = []
        if self.item is not None:
            output = [_message(self.item["id"], self.said, self.told, status)]
            place = {"item_id": self.item["id"], "output_index": 0, "content_index": 0}
            yield self._event("response.output_text.done", **place, text=self.said, logprobs=self.told)
            yield self._event("response.content_part.done", **place, part=output[0]["content"][0])
            yield self._event("response.output_item.done", output_index=0, item=output[0])
        for call in map(_call, calls):
            at = len(output)
            output.append(call)
            place = {"item_id": call["id"], "output_index": at}
            begun = {**call, "arguments": "", "status": "in_progress"}
            yield self._event("response.output_item.added", output_index=at, item=begun)
            yield self._event("response.function_call_arguments.delta", **place, delta=call["arguments"])
            done = {"arguments": call["arguments"], "name": call["name"]}
            yield self._event("response.function_call_arguments.done", **place, **done)
            yield self._event("response.output_item.done", output_index=at, item=call)
        yield self._event(f"response.{status}", response=self._response(status, output, reply))

    def broken(self, error: RequestError) -> Iterator[bytes]:
        """What went wrong."""
        told = {key: error.body["error"][key] for key in ("message", "param", "code")}
        failed = {"code": "server_error" if error.status >= 500 else "invalid_prompt", "message": told["message"]}
        yield self._event("response.failed", response=self._response("failed", []) | {"error": failed})
        yield self._event("error", **told)

    def _say(self, text: str, told: list[Json]) -> Iterator[bytes]:
        if not text and not told:
            return
        if self.item is None:
            yield from self._begin()
        assert self.item is not None
        self.said, self.told = self.said + text, self.told + told
        place = {"item_id": self.item["id"], "output_index": 0, "content_index": 0}
        yield self._event("response.output_text.delta", **place, delta=text, logprobs=told)

    def _begin(self) -> Iterator[bytes]:
        self.item = _message(_id("msg"), "", [], "in_progress")
        (part,) = self.item["content"]
        yield self._event("response.output_item.added", output_index=0, item={**self.item, "content": []})
        place = {"item_id": self.item["id"], "output_index": 0, "content_index": 0}
        yield self._event("response.content_part.added", **place, part=part)

    def _event(self, kind: str, **fields: Any) -> bytes:
        self.number += 1
        return data({"type": kind, "sequence_number": self.number - 1, **fields}, kind)

    def _logprobs(self, chances: Sequence[Any]) -> list[Json]:
        return logprobs(self.served, chances) if self.params.logprobs is not None else []

    def _response(self, status: str, output: list[Json], reply: Reply | None = None) -> Json:
        """The whole object, which repeats what was asked."""
        request, usage = self.request, None if reply is None else usage_of([reply], self.messages)
        asked = request.model_dump(
            by_alias=True, exclude_none=True, include={"tools", "tool_choice", "text"}, warnings=False
        )
        return {
            **self.head,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "model": self.served.name,
            "output": output,
            "parallel_tool_calls": request.parallel_tool_calls,
            "previous_response_id": None,
            "store": False,
            "temperature": self.params.temperature,
            "top_p": self.params.top_p,
            "top_logprobs": request.top_logprobs or 0,
            "truncation": "disabled",
            "metadata": request.metadata or {},
            **asked,
            "usage": None if usage is None else _usage(usage),
        }


def _id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


def _message(name: str, text: str, told: list[Json], status: str) -> Json:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": told}
    return {"type": "message", "id": name, "status": status, "role": "assistant", "content": [part]}


def _call(call: Json) -> Json:
    return {"type": "function_call", "id": _id("fc"), "call_id": call["id"], **call["function"], "status": "completed"}


def _usage(usage: Json) -> Json:
    details = usage.get("prompt_tokens_details", {})
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0, **details},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }


def _format(asked: _Format) -> Format:
    if asked.type != "json_schema":
        if given := asked.model_fields_set - {"type"}:
            place = f"text.format.{min(given).rstrip('_')}"
            raise RequestError(f"{place}: goes with the type json_schema", place)
        return Format(type=asked.type)
    for name in ("name", "schema"):
        if getattr(asked, {"schema": "schema_"}.get(name, name)) is None:
            place = f"text.format.{name}"
            raise RequestError(f"{place}: is missing", place, code="missing_required_parameter")
    return Format(type="json_schema", json_schema=Schema(name=asked.name or "", schema=asked.schema_ or {}))


def _conversation(request: _Request, served: Served) -> list[Message]:
    """The input as messages; calls that stand together are one message's."""
    items = [_Item(role="user", content=request.input)] if isinstance(request.input, str) else request.input
    turns: list[Turn] = []
    places: list[str] = []
    if request.instructions is not None:
        turns, places = [Turn(role="system", content=request.instructions)], ["instructions"]
    for number, item in enumerate(items):
        place = "input" if isinstance(request.input, str) else f"input[{number}]"
        needed, given = _FIELDS[item.type], item.model_fields_set - {"type", "id", "status"}
        for name in given ^ {*needed}:
            told = "is missing" if name in needed else f"does not belong to an item of type {item.type!r}"
            raise RequestError(f"{place}.{name}: {told}", f"{place}.{name}")
        if item.type == "function_call":
            called = Called(name=item.name or "", arguments=item.arguments or "")
            call = Call(id=item.call_id or "", type="function", function=called)
            if turns and turns[-1].role == "assistant":
                turns[-1] = turns[-1].model_copy(update={"tool_calls": [*(turns[-1].tool_calls or ()), call]})
                continue
            turns.append(Turn(role="assistant", tool_calls=[call]))
        elif item.type == "function_call_output":
            content = _content(item.output, f"{place}.output", "user")
            turns.append(Turn(role="tool", tool_call_id=item.call_id, content=content))
        else:
            content = _content(item.content, f"{place}.content", str(item.role))
            assert item.role is not None  # looked at above
            turns.append(Turn(role=item.role, content=content))
        places.append(place)
    try:
        return messages_of(turns, served, places)
    except RequestError as error:  # of a part that is written otherwise here
        told, place = str(error), error.param or ""
        for theirs, ours in ((".image_url.url", ".image_url"), (".file.file_data", ".file_data")):
            told, place = told.replace(theirs, ours), place.replace(theirs, ours)
        raise RequestError(told, place or None, error.status, error.reason) from None


def _content(given: Any, place: str, role: str) -> str | list[RequestPart]:
    """A message's content as the chat API has it."""
    if isinstance(given, str):
        return given
    parts = []
    for at, part in enumerate(given):
        where, needed = f"{place}[{at}]", _VALUES[part.type]
        remarks = {"input_image": {"detail"}, "input_file": {"filename"}, "output_text": {"annotations", "logprobs"}}
        if (part.type == "output_text") != (role == "assistant"):
            raise RequestError(f"{where}.type: {part.type!r} is nothing that the {role} says", f"{where}.type")
        for name in (part.model_fields_set - remarks.get(part.type, set())) ^ {"type", needed}:
            told = "is missing" if name == needed else f"does not belong to a part of type {part.type!r}"
            raise RequestError(f"{where}.{name}: {told}", f"{where}.{name}")
        if needed == "text":
            parts.append(RequestPart(type="text", text=part.text))
        elif part.type == "input_image":
            parts.append(RequestPart(type="image_url", image_url=Url(url=part.image_url)))
        elif part.type == "input_audio":
            parts.append(RequestPart(type="input_audio", input_audio=part.input_audio))
        else:
            parts.append(RequestPart(type="file", file=File(file_data=part.file_data, filename=part.filename)))
    return parts


def _read(body: bytes, models: Mapping[str, Served]) -> ResponseAnswer:
    request = parse(body, _Request)
    return ResponseAnswer(request, model_of(models, request.model))


ROUTES = [route("/v1/responses", _read)]
