"""What a chat may ask of its answer besides: a schema, calls of tools, how likely each token was, penalties."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from polymodal.generation.params import GenerationParams
from polymodal.generation.streaming import TextDelta, decode_ids
from tests.serving.conftest import Running
from tests.serving.test_chat import ASK, client

pytest.importorskip("llguidance")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "none": {"const": None}},
    "required": ["kind", "none"],
    "additionalProperties": False,
}
CITY = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"],
        "additionalProperties": False}  # fmt: skip
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": CITY}},
    {"type": "function", "function": {"name": "clock"}},
]


def ask(server: Running, **options: Any) -> Any:
    return client(server).chat.completions.create(**{**ASK, "max_tokens": 60, **options})


def test_a_schema_is_met_whole_and_in_pieces(tiny: Running) -> None:
    given = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    (choice,) = ask(tiny, response_format=given).choices
    said = json.loads(choice.message.content)
    assert said == {"kind": said["kind"], "none": None} and said["kind"] in ("cat", "dog")
    assert choice.finish_reason == "stop"
    hot = [c.message.content for c in ask(tiny, response_format=given, temperature=2, seed=1, n=4).choices]
    assert {json.loads(text)["kind"] for text in hot} == {"cat", "dog"}
    pieces = list(ask(tiny, response_format=given, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == choice.message.content
    any_object = ask(tiny, response_format={"type": "json_object"}).choices[0].message.content
    assert any_object.startswith("{")
    assert (
        ask(tiny, response_format={"type": "text"}).choices[0].message.content == ask(tiny).choices[0].message.content
    )


def test_logprobs_whole_and_in_pieces(tiny: Running) -> None:
    (choice,) = ask(tiny, logprobs=True, top_logprobs=3, max_tokens=20).choices
    told = choice.logprobs.content
    assert len(told) == 20 and all(len(one.top_logprobs) == 3 for one in told)
    assert all(one.top_logprobs[0].logprob == pytest.approx(one.logprob) for one in told)  # greedy
    whole = b"".join(bytes(one.bytes) for one in told).decode("utf-8", "replace")
    assert whole == choice.message.content
    pieces = [p.choices[0] for p in ask(tiny, logprobs=True, top_logprobs=3, max_tokens=20, stream=True)]
    streamed = [one for p in pieces if p.logprobs for one in p.logprobs.content]
    assert [one.bytes for one in streamed] == [one.bytes for one in told]
    assert [one.logprob for one in streamed] == pytest.approx([one.logprob for one in told], abs=1e-4)
    assert ask(tiny, logprobs=True, max_tokens=2).choices[0].logprobs.content[0].top_logprobs == []
    assert ask(tiny, max_tokens=2).choices[0].logprobs is None
    # Of what a stop text cuts off nothing is told.
    stop = choice.message.content[7:9]
    (cut,) = ask(tiny, logprobs=True, max_tokens=20, stop=stop).choices
    said = b"".join(bytes(one.bytes) for one in cut.logprobs.content)
    assert said.decode("utf-8", "replace").startswith(cut.message.content) and len(cut.logprobs.content) < 20


def test_penalties_and_bias_reach_the_model(tiny: Running) -> None:
    backend: Any = tiny.backend
    for settings in (
        {"frequency_penalty": 1.5},
        {"presence_penalty": 2.0},
        {"temperature": 1.5, "seed": 3, "min_p": 0.3},
    ):
        expected = backend.generate("hi", GenerationParams(max_new_tokens=40, **settings)).text
        more = {"extra_body": {"min_p": settings.pop("min_p")}} if "min_p" in settings else {}
        assert ask(tiny, max_tokens=40, **settings, **more).choices[0].message.content == expected
    token = backend.tokenizer("Z", add_special_tokens=False).input_ids[-1]
    text = ask(tiny, logit_bias={str(token): 100}, max_tokens=5).choices[0].message.content
    assert text == decode_ids(backend.tokenizer, [token] * 5)


def test_remarks_are_taken(tiny: Running) -> None:
    remarks = {"user": "u", "metadata": {"a": "b"}, "service_tier": "auto", "safety_identifier": "s",
               "prompt_cache_key": "k", "store": False, "parallel_tool_calls": True}  # fmt: skip
    assert ask(tiny, **remarks).choices[0].message.content == ask(tiny).choices[0].message.content
    for name, value in (("service_tier", "flex"), ("store", True), ("user", 5), ("metadata", {"a": 1})):
        answer = tiny.post({**ASK, name: value})
        assert answer.status_code == 400 and answer.json()["error"]["param"].startswith(name)


def test_a_forced_call_and_its_result(tooled: Running) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        (found,) = ask(tooled, max_tokens=128, tools=TOOLS[:1], tool_choice=choice).choices
        (call,) = found.message.tool_calls
        assert found.finish_reason == "tool_calls" and found.message.content is None
        assert call.function.name == "weather" and json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    pieces = list(ask(tooled, max_tokens=128, tools=TOOLS[:1], tool_choice="required", stream=True))
    (streamed,) = [one for p in pieces for one in p.choices[0].delta.tool_calls or ()]
    assert (
        streamed.function.model_dump() == call.function.model_dump()
        and pieces[-1].choices[0].finish_reason == "tool_calls"
    )
    said = found.message.model_dump()
    result = {"role": "tool", "tool_call_id": call.id, "content": "3 degrees"}
    after = ask(tooled, tools=TOOLS, messages=[*ASK["messages"], said, result])
    before = ask(tooled, tools=TOOLS)
    assert after.usage.prompt_tokens > before.usage.prompt_tokens > ask(tooled).usage.prompt_tokens
    for turns, place in (
        ([said], "messages[1].role"), ([said, *ASK["messages"]], "messages[2].role"),
        ([said, {**result, "tool_call_id": "other"}], "messages[2].tool_call_id"),
        ([said, result, result], "messages[3].tool_call_id"), ([result], "messages[1].tool_call_id"),
        ([{**said, "role": "user", "content": "x"}], "messages[1].tool_calls"),
    ):  # fmt: skip
        answer = tooled.post({**ASK, "messages": [*ASK["messages"], *turns], "tools": TOOLS})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == place, answer.text


def test_what_of_tools_is_refused(tooled: Running) -> None:
    strict = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}]
    for more, place in (
        ({"tools": strict}, "tools[0].function.strict"),
        ({"tools": TOOLS + TOOLS}, "tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "rm"}}},
         "tool_choice.function.name"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": TOOLS * 65}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "description": "x" * 10**5}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "banana"}}}],
          "tool_choice": "required"}, "tools"),
    ):  # fmt: skip
        answer = tooled.post({**ASK, **more})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == place, answer.text
    assert tooled.post({**ASK, "tools": strict, "tool_choice": "required"}).status_code == 200


CALL = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "parallel", "said", "calls"),
    [
        (f"I look.\n{CALL}\n{CALL}", True, "I look.", 2),
        (f"I look.\n{CALL}\n{CALL}", False, "I look.", 1),
        ("a < b, <tool", True, "a < b, <tool", 0),
        (CALL.replace("clock", "rm"), True, CALL.replace("clock", "rm"), 0),
        (CALL[:-13], True, None, 1),  # cut off at its end token
        (CALL[:30], True, CALL[:30], 0),
    ],
)  # fmt: skip
def test_calls_are_told_from_text(
    text: str, parallel: bool, said: str | None, calls: int, told: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from polymodal.backends.base import Reply, Timing, Usage
    from polymodal.messages import assistant
    from polymodal.processing.chat_template.calls import CallForm

    model, server = told()

    def stream(messages: Any, params: Any = None) -> Any:
        assert [tool["function"]["name"] for tool in messages[0].tools] == ["weather", "clock"]
        yield from (TextDelta(text[at : at + 3]) for at in range(0, len(text), 3))
        yield Reply(assistant(text), Usage(3, 0, 2), Timing(0, 0, 0, 0, 0), "stop", "x")

    monkeypatch.setattr(model, "stream", stream)
    monkeypatch.setattr(model, "calls", CallForm("<tool_call>\n", "\n</tool_call>", "name", "arguments", False), False)
    (found,) = ask(server, tools=TOOLS, parallel_tool_calls=parallel).choices
    assert found.message.content == said and len(found.message.tool_calls or ()) == calls
    assert found.finish_reason == ("tool_calls" if calls else "stop")
    pieces = [p.choices[0] for p in ask(server, tools=TOOLS, parallel_tool_calls=parallel, stream=True)]
    assert "".join(p.delta.content or "" for p in pieces) == (said or "")
    assert sum(len(p.delta.tool_calls or ()) for p in pieces) == calls
    assert pieces[-1].finish_reason == found.finish_reason
