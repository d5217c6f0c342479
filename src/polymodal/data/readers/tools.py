"""Reasoning and tools in rows, as OpenAI and transformers write them, and as ShareGPT-like sets (LLaMA-Factory) do.

`reasoning_content` beside an answer; `tool_calls` in place of one or beside it; turns of the role `tool`; `tools`
beside the turns, as a list or as JSON text. In ShareGPT a call is a turn of its own, `function_call`, whose text is the
JSON of one call or of several, and a result is an `observation`. Whether a model's chat template has a place for them
is found where it is rendered; what has no meaning in any template is refused here.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from polymodal.errors import DataError
from polymodal.messages import Message, Role

CALLS = ("function_call", "tool_call")
"""Roles of turns that are one call of the assistant, written down as JSON."""
_REASONING = ("reasoning_content", "reasoning", "thinking")
_NEXT: dict[str, tuple[Role, ...]] = {
    "": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""Who may speak after whom."""


def says_nothing(value: Any) -> bool:
    """Whether a key of a row is there in name only."""
    return value is None or value is False or value in ("", [], [""], [None], {}, "[]", "{}", "null")


def turn_fields(turn: Mapping[str, Any], role: Role, spot: str) -> dict[str, Any]:
    """What a turn says beside its text, as fields of a `Message`."""
    fields: dict[str, Any] = {}
    thoughts = {key: turn[key] for key in _REASONING if not says_nothing(turn.get(key))}
    for key, value in thoughts.items():
        if not isinstance(value, str):
            raise DataError(f"{spot}: `{key}` must be text, found {type(value).__name__}")
        if value != next(iter(thoughts.values())):
            raise DataError(
                f"{spot}: has both {' and '.join(f'`{name}`' for name in thoughts)}, which differ; keep one"
            )
        fields["reasoning_content"] = value
    if not says_nothing(turn.get("tool_calls")):
        fields["tool_calls"] = _calls(turn["tool_calls"], f"{spot}: `tool_calls`")
    if fields and role != "assistant":
        key = next(iter([*thoughts, "tool_calls"]))
        raise DataError(
            f"{spot}: `{key}` in a turn of the {role}; only the assistant reasons and calls", "unsupported-key"
        )
    for key in ("tool_call_id", "name") if role == "tool" else ():
        if isinstance(turn.get(key), str | int) and turn[key] != "":
            fields[key] = str(turn[key])
    return fields


def call_turn(text: Any, spot: str) -> tuple[dict[str, Any], ...]:
    """The calls of a turn of the role `function_call`."""
    return _calls(_json(text, f"{spot}: a call"), f"{spot}: a call")


def tools_of(record: Mapping[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    """The functions that a row names in `tools`."""
    given = record.get("tools")
    if says_nothing(given):
        return ()
    found = _json(given, f"{where}: `tools`")
    tools = found if isinstance(found, list) else [found]
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise DataError(
                f"{where}: `tools`[{index}] must be an object with `function` and its `name`, as in OpenAI's requests"
            )
    if "conversations" in record:  # LLaMA-Factory leaves out what all have
        tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return tuple(tools)


def check_turns(messages: Sequence[Message], where: str) -> None:
    """An optional system message, then user and assistant in turn; after the assistant, tools may say their results."""
    first = 1 if messages[0].role == "system" else 0
    before = ""
    for number, message in enumerate(messages[first:], start=first + 1):
        if message.role in _NEXT[before]:
            before = message.role
            continue
        problem = f"turn {number} is the {message.role}'s; user and assistant must take turns"
        if before == "" and message.role == "assistant":
            problem = "the conversation starts with the assistant; it must start with the user"
        elif "tool" in (before, message.role):
            problem = (
                f"turn {number} is the {message.role}'s; a tool's result stands between two turns of the assistant"
            )
        raise DataError(f"{where}: {problem}", "role-order")
    if not before:
        raise DataError(f"{where}: the conversation has only a system message", "role-order")


def _calls(value: Any, spot: str) -> tuple[dict[str, Any], ...]:
    """Check calls; one without `function` around it is given it."""
    found = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise DataError(f'{spot} must be {{"function": {{"name": ..., "arguments": {{...}}}}}}')
        if function.get("arguments") in (None, ""):
            function = {**function, "arguments": {}}
        if not isinstance(_json(function["arguments"], f"{spot}: `arguments`"), dict):
            raise DataError(f"{spot}: `arguments` of {function['name']!r} must be an object, or its JSON text")
        about = call if "function" in call else {"type": "function"}
        found.append({**about, "function": function})
    return tuple(found)


def _json(value: Any, spot: str) -> Any:
    """A value, or what its text says."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(f"{spot} must be JSON, found {value[:60]!r}") from None
