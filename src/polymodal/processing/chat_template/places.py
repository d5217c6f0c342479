"""Whether a chat template has a place for reasoning and tools, and whether all of them came through.

Nobody's name is believed: a conversation with such a field is rendered, and the text looked for. What a template reads
of tools besides the names of called functions (schemas, arguments, ids) is given to it as it is, since templates look
at it; only control tokens that somebody typed in it are disguised (`PieceTokenizer.disguised`).
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from polymodal.errors import PolymodalError
from polymodal.messages import Message
from polymodal.processing.chat_template.pieces import Cut, MarkedTemplate, Piece, Style, Turn, in_json
from polymodal.safety.jinja_limits import UnsafeTemplateError

SURROGATE = re.compile("[\ud800-\udfff]")
HALF = "the text holds half of a surrogate pair, which is no character; mend its encoding"
FIELDS = ("reasoning_content", "tools", "tool_calls", "role: tool")
"""What a template may have no place for."""
AS_THEY_ARE = ("tool_calls", "tool_call_id", "name")
"""Fields of a message that are given to a template as they are, but for the names of the called functions."""
QUOTED = "quoted-arguments"
"""The code of an error about arguments that were given as text, and that the template would quote once more."""
_REASONING = ("reasoning_content", "reasoning")
_ID, _NAME = "a1b2c3d4e", "PMtool"
_CALLS = [
    {"id": _ID, "type": "function", "function": {"name": "", "arguments": given}}
    for given in ({"city": "Oslo"}, '{"city": "Oslo"}')
]
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "A description.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "A city."}}},
    },
}


def find(template: MarkedTemplate, style: Style) -> dict[str, str]:
    """The fields that a template writes, with its own name for each."""

    def shows(piece: Piece, *turns: Turn, tools: Sequence[Any] = ()) -> bool:
        cuts = _cuts(template, style, turns, tools)
        pieces = [piece for turn in turns for piece in turn.pieces]
        return any(cut.marker is not None and pieces[cut.marker] is piece for cut in cuts)

    question, answer = Turn("user", (Piece("user", 0, ""),)), Piece("assistant", 1, "")
    call, result = Piece("assistant", 1, "", field="tool_calls"), Piece("tool", 2, "")
    called, texted = (Turn("assistant", (call,), {"tool_calls": [given]}) for given in _CALLS)
    told = Turn("tool", (result,), {"tool_call_id": _ID, "name": "f"})
    found: dict[str, str] = {}
    for name in _REASONING:
        thought = Piece("assistant", 1, "", reasoning=True, field=name)
        turns = (Turn("assistant", (thought, answer)), replace(called, pieces=(thought, call)))
        if any(shows(thought, question, turn) for turn in turns):
            found.setdefault("reasoning_content", name)
    ways = itertools.product((called, texted), ("", None), ((), (_TOOL,)))
    if any(shows(call, question, replace(turn, nothing=nothing), tools=tools) for turn, nothing, tools in ways):
        found["tool_calls"] = "tool_calls"
    if any(shows(result, question, turn, told) for turn in (called, Turn("assistant", (answer,)))):
        found["role: tool"] = "role"
    if any(_NAME in cut.scaffold for cut in _cuts(template, style, (question,), (_TOOL,))):
        found["tools"] = "tools"
    return found


def require(messages: Sequence[Message], found: Mapping[str, str], template: str) -> None:
    """Refuse reasoning and tools that a template has no place for."""
    for number, message in enumerate(messages, start=1):
        fields = [*message.fields, *(["role: tool"] if message.role == "tool" else [])]
        lost = next((field for field in fields if field in FIELDS and field not in found), None)
        if lost is not None:
            raise PolymodalError(
                f"message {number}: `{lost}`: {template} has no place for it; write it into the text, take it out, or "
                "choose a template that has one"
            )
        if message.tools and number > 1:
            raise PolymodalError(f"message {number}: `tools` are named once, on the first message")
        if SURROGATE.search(json.dumps(message.fields, ensure_ascii=False)):
            raise PolymodalError(f"message {number}: {HALF}")


def _cuts(template: MarkedTemplate, style: Style, turns: Sequence[Turn], tools: Sequence[Any]) -> list[Cut]:
    try:
        return template.cuts(turns, style, tools)
    except UnsafeTemplateError:
        raise
    except PolymodalError:
        return []


def versions(turns: list[Turn]) -> Iterator[list[Turn]]:
    """A conversation as it was given; then with calls as templates want them that fail on arguments or empty texts."""
    called = [turn for turn in turns if "tool_calls" in turn.fields]
    alone = any(_is_alone(turn) for turn in called)
    for swapped, turned in itertools.product(
        (False, True) if alone else (False,), (False, True) if called else (False,)
    ):
        yield [_version(turn, swapped, turned) if "tool_calls" in turn.fields else turn for turn in turns]


def _is_alone(turn: Turn) -> bool:
    """Whether a call has no text beside it."""
    return all(piece.field for piece in turn.pieces)


def _version(turn: Turn, swapped: bool, turned: bool) -> Turn:
    calls = turn.fields["tool_calls"]
    if turned:  # text to an object, as transformers asks for; an object to text, as OpenAI has it
        calls = [{**call, "function": {**call["function"], "arguments": _turned(call)}} for call in calls]
    nothing = turn.nothing if not swapped else "" if turn.nothing is None else None
    return replace(turn, fields={**turn.fields, "tool_calls": calls}, nothing=nothing)


def _turned(call: Mapping[str, Any]) -> Any:
    arguments = call["function"]["arguments"]
    return json.loads(arguments) if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def check(cuts: Sequence[Cut], turns: Sequence[Turn], tools: Sequence[Any]) -> None:
    """Raise where a template leaves out something of a call, or a tool."""
    pieces = [(piece, turn) for turn in turns for piece in turn.pieces]
    if tools:
        written = "".join(cut.scaffold for cut in cuts)
        lost = next((name for name in map(_name, tools) if not _holds(written, name)), None)
        if lost is not None:
            raise PolymodalError(f"the chat template leaves out the tool {lost!r}; take it out of `tools`")
    for place, cut in enumerate(cuts[:-1]):
        piece, turn = pieces[cut.marker or 0]
        if piece.field != "tool_calls":
            continue
        where = f"message {piece.message + 1}: the chat template"
        calls = [other for other in turn.pieces if other.field == "tool_calls"]
        number = next(number for number, other in enumerate(calls) if other is piece)
        arguments, written = turn.fields["tool_calls"][number]["function"]["arguments"], cuts[place + 1].scaffold
        if isinstance(arguments, str) and any(f'"{text}"' in written for text in in_json(arguments)):
            raise PolymodalError(f"{where} takes the arguments of a call for a text; give an object", QUOTED)
        lost = next((leaf for leaf in _leaves(arguments) if not _holds(written, leaf)), None)
        if lost is not None:
            raise PolymodalError(f"{where} leaves out {lost!r} of the call's arguments; choose another template")


def _name(tool: Mapping[str, Any]) -> str:
    function = tool.get("function", tool)
    return str(function.get("name", "")) if isinstance(function, Mapping) else ""


def _leaves(value: Any) -> Iterator[Any]:
    """All keys and values of JSON."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _holds(written: str, leaf: Any) -> bool:
    forms = (leaf, *in_json(leaf)) if isinstance(leaf, str) else (json.dumps(leaf), str(leaf))
    return any(form in written for form in forms)


def misplaced(pieces: Sequence[Piece], expected: int, marked: int | None) -> PolymodalError:
    """Say what a template did to the content."""
    if expected >= len(pieces):
        return PolymodalError("the chat template writes some of the content twice; choose another template")
    piece = pieces[expected]
    what = "image" if piece.text is None else "text"
    what = "call" if piece.field == "tool_calls" else what
    who = f"the {piece.role}'s {what} (message {piece.message + 1})"
    if piece.message < 0:
        who = "the default system message"
    if marked is not None and marked < expected:
        return PolymodalError(f"the chat template repeats or moves content before {who}; choose another template")
    return PolymodalError(f"the chat template drops or moves {who}; change the conversation or choose another template")
