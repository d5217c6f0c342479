"""Calls of tools as a model writes them: found by rendering one, read back from answers, forced by a grammar."""

import json
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from polymodal.errors import PolymodalError
from polymodal.messages import Message, Text, user

_NAME, _ARGUMENTS = "PMtool", {"city": "Oslo"}
_FUNCTION = {
    "name": _NAME,
    "description": "A description.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
_TOOL = {"type": "function", "function": _FUNCTION}
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class CallForm:
    """The form of calls in an answer's text: JSON between two texts."""

    before: str  # Begins a call; "" where an answer is nothing but its calls
    after: str
    name: str  # The key of the function's name
    arguments: str
    listed: bool  # Whether all calls stand in one list

    def begins(self, text: str) -> int:
        """Where the first call of a text begins, or may begin in what is not there yet; its length where none does."""
        mark = self.before.strip()
        if not mark:
            start = len(text) - len(text.lstrip())
            return start if text[start : start + 1] in ("", "[" if self.listed else "{") else len(text)
        if (at := text.find(mark)) >= 0:
            return at
        return len(text) - max((n for n in range(1, len(mark)) if text.endswith(mark[:n])), default=0)

    def read(self, text: str, names: Sequence[str]) -> tuple[str, list[dict[str, Any]]]:
        """The text before the calls, and the calls as OpenAI has them; no call where one of them is no whole one."""
        mark, after = self.before.strip(), self.after.strip()
        said, rest = text[: self.begins(text)], text[self.begins(text) :].strip()
        calls: list[dict[str, Any]] = []
        while rest:
            if not rest.startswith(mark):
                return text, []
            rest = rest.removeprefix(mark).lstrip()
            try:
                found, end = _DECODER.raw_decode(rest)
            except (ValueError, RecursionError):
                return text, []
            rest = rest[end:].lstrip().removeprefix(after).lstrip()
            for call in found if isinstance(found, list) else [found]:
                name, arguments = (
                    (call.get(self.name), call.get(self.arguments)) if isinstance(call, dict) else ("", "")
                )
                if name not in names or not isinstance(arguments, dict):
                    return text, []
                given = json.dumps(arguments, ensure_ascii=False)
                function = {"name": name, "arguments": given}
                calls.append({"id": secrets.token_hex(5)[:9], "type": "function", "function": function})
            if not mark and rest:
                return text, []
        return (said.rstrip(), calls) if calls else (text, [])

    def grammar(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """A grammar, in llguidance's Lark, of an answer that is one call of one of these tools."""
        ways = [
            {
                "type": "object",
                "properties": {
                    self.name: {"const": tool["function"]["name"]},
                    self.arguments: tool["function"].get("parameters") or {"type": "object"},
                },
                "required": [self.name, self.arguments],
                "additionalProperties": False,
            }
            for tool in tools
        ]
        call: dict[str, Any] = {"anyOf": ways} if len(ways) > 1 else ways[0]
        if self.listed:
            call = {"type": "array", "items": call, "minItems": 1, "maxItems": 1}
        form = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        parts = [json.dumps(self.before), "call", json.dumps(self.after)]
        start = " ".join(part for part in parts if part != '""')
        return f"start: {start}\ncall: %json {json.dumps({**call, 'x-guidance': form})}"


def find_form(template: Any, tokenizer: Any) -> CallForm | None:
    """How a chat template has its model write calls; None where it has no place for them, or writes no JSON."""
    called = ({"id": "a1b2c3d4e", "type": "function", "function": {"name": _NAME, "arguments": _ARGUMENTS}},)
    asked = [Message("user", (Text("?"),), tools=(_TOOL,)), Message("assistant", (), tool_calls=called)]
    asked += [Message("tool", (Text("1"),), tool_call_id="a1b2c3d4e", name=_NAME), user("?")]
    for messages in (asked, asked[:3], asked[:2]):  # templates have rules on what stands behind a result
        with suppress(PolymodalError):
            rendered = template.render(messages)
            trained = [token for token, mask in zip(rendered.input_ids, rendered.loss_mask, strict=True) if mask]
            return _form_of(tokenizer.decode(trained, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return None


def _form_of(text: str) -> CallForm | None:
    at = text.find(_NAME)
    for start in range(at):
        if text[start] not in "[{":
            continue
        try:
            found, end = _DECODER.raw_decode(text[start:])
        except ValueError:
            continue
        call = found[0] if isinstance(found, list) and found else found
        if start + end <= at or not isinstance(call, dict):
            continue
        keys = {key: value for key, value in call.items() if value in (_NAME, _ARGUMENTS)}
        if len(keys) != 2:
            return None
        name, arguments = sorted(keys, key=lambda key: keys[key] != _NAME)
        before = text[:start].rpartition("</think>")[2].lstrip()
        return CallForm(before, text[start + end :].rstrip(), name, arguments, isinstance(found, list))
    return None
