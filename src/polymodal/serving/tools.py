"""Tools that a request offers, calls in its conversation, and the schema that its answer has to meet."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag

from polymodal.backends.base import Backend
from polymodal.messages import Message
from polymodal.processing.chat_template.calls import CallForm
from polymodal.serving.errors import Checked, Json, RequestError
from polymodal.utils.strict import shown

MAX_TOOLS = 128
Name: TypeAlias = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Function(Checked):
    """A function that may be called."""

    name: Name
    description: str | None = None
    parameters: Json | None = None
    strict: bool = False


class Tool(Checked):
    """A tool."""

    type: Literal["function"]
    function: Function


class Called(Checked):
    """What was called."""

    name: Name
    arguments: str


class Call(Checked):
    """A call that the assistant made."""

    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"]
    function: Called


class Named(Checked):
    """A function by its name."""

    name: Name


class ForcedCall(Checked):
    """The function that has to be called."""

    type: Literal["function"]
    function: Named


Choice: TypeAlias = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")] | Annotated[ForcedCall, Tag("<function>")],
    Discriminator(lambda value: "<function>" if isinstance(value, dict) else "<word>"),
]


class Schema(Checked):
    """A schema that an answer has to meet."""

    name: Name  # a remark, as the next one is
    description: str | None = None
    schema_: Json = Field(alias="schema")
    strict: bool | None = None  # it is followed in any case


class Format(Checked):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None


@dataclass(frozen=True)
class Calling:
    """What an answer may call, and how it is written."""

    form: CallForm
    tools: tuple[Json, ...]
    forced: tuple[Json, ...]  # One of these has to be called
    parallel: bool

    def read(self, text: str) -> tuple[str, list[Json]]:
        """The text before the calls, and the calls."""
        said, calls = self.form.read(text, [tool["function"]["name"] for tool in self.tools])
        return said, calls if self.parallel else calls[:1]


def calling_of(
    tools: Sequence[Tool], choice: Any, parallel: bool, backend: Backend, inner: str = ".function"
) -> Calling | None:
    """How an answer calls tools; None where it does not. `inner` is where a route has what is said of a function."""
    if not tools or choice == "none":
        if choice not in (None, "none", "auto"):
            raise RequestError("tool_choice: there are no tools to choose from", "tool_choice")
        return None
    if backend.calls is None:
        raise _no_place("tools")
    given = [tool.model_dump(exclude_none=True, exclude_defaults=True) for tool in tools]
    names = [tool.function.name for tool in tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RequestError(f"tools: two are called {twice!r}", "tools")
    forced = given if choice == "required" else []
    if isinstance(choice, ForcedCall):
        forced = [tool for tool in given if tool["function"]["name"] == choice.function.name]
        if not forced:
            place = f"tool_choice{inner}.name"
            raise RequestError(f"{place}: {shown(choice.function.name)} is none of the tools", place)
    strict = next((number for number, tool in enumerate(tools) if tool.function.strict), None)
    if strict is not None and not forced:
        place = f"tools[{strict}]{inner}.strict"
        told = 'arguments follow their schema where a call is forced (tool_choice "required" or a function)'
        raise RequestError(f"{place}: {told}; leave it out", place, code="unsupported_parameter")
    shown_tools = [{**tool, "function": {k: v for k, v in tool["function"].items() if k != "strict"}} for tool in given]
    return Calling(backend.calls, tuple(shown_tools), tuple(forced), parallel)


def _no_place(place: str) -> RequestError:
    told = "this model's chat template has no place for tools and their calls, or writes them in no JSON"
    return RequestError(f"{place}: {told}", place, code="unsupported_parameter")


def with_tools(messages: list[Message], calling: Calling | None, most: int) -> list[Message]:
    """A conversation that names the tools which may be called, in up to so many characters."""
    if calling is None:
        return messages
    if (length := len(json.dumps(calling.tools))) > most:
        told = f"tools: {length:,} characters, more than the model's context can hold"
        raise RequestError(told, "tools", code="context_length_exceeded")
    return [replace(messages[0], tools=calling.tools), *messages[1:]]


def following(asked: Format | None, calling: Calling | None, place: str = "response_format") -> Json:
    """The settings of an answer that has to have a form."""
    if asked is not None and (asked.json_schema is None) == (asked.type == "json_schema"):
        told = "is missing" if asked.json_schema is None else "goes with the type json_schema"
        raise RequestError(f"{place}.json_schema: {told}", f"{place}.json_schema")
    if asked is not None and asked.type != "text":
        if calling is not None:
            raise RequestError(f"{place}: an answer that may call tools has no other form", place)
        return {"response_schema": {"type": "object"} if asked.json_schema is None else asked.json_schema.schema_}
    return {"grammar": calling.form.grammar(calling.forced)} if calling is not None and calling.forced else {}


def call_fields(turns: Sequence[Any], places: Sequence[str], backend: Backend) -> list[Json]:
    """What messages say of calls and their results; each call has one result, right behind it."""
    found: list[Json] = []
    waiting: dict[str, str] = {}  # The name of the function, of each call without a result
    for turn, place in zip(turns, places, strict=True):
        for name, role in (("tool_calls", "assistant"), ("tool_call_id", "tool"), ("name", "tool")):
            if getattr(turn, name) is not None and turn.role != role:
                raise RequestError(f"{place}.{name}: belongs to messages of the role {role!r}", f"{place}.{name}")
        if (turn.role == "tool" or turn.tool_calls) and backend.calls is None:
            raise _no_place(f"{place}.{'role' if turn.role == 'tool' else 'tool_calls'}")
        fields: Json = {}
        if turn.role == "tool":
            if turn.tool_call_id not in waiting:
                told = "is missing" if turn.tool_call_id is None else "no call before it has this id and no result"
                raise RequestError(f"{place}.tool_call_id: {told}", f"{place}.tool_call_id")
            fields = {"tool_call_id": turn.tool_call_id, "name": waiting.pop(turn.tool_call_id)}
        elif waiting:
            raise RequestError(f"{place}.role: the call {shown(next(iter(waiting)))} has no result", f"{place}.role")
        for at, call in enumerate(turn.tool_calls or ()):
            where = f"{place}.tool_calls[{at}].function.arguments"
            waiting[call.id] = call.function.name
            function = {"name": call.function.name, "arguments": _arguments(call.function.arguments, where)}
            written: Mapping[str, Any] = {"id": call.id, "type": "function", "function": function}
            fields["tool_calls"] = (*fields.get("tool_calls", ()), written)
        found.append(fields)
    if waiting:
        place = places[-1]
        raise RequestError(f"{place}: the call {shown(next(iter(waiting)))} has no result", place)
    return found


def _arguments(text: str, place: str) -> Json:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise RequestError(f"{place}: must be the JSON of an object", place, code="invalid_value")
    return value
