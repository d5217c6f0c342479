"""The Responses API over its official client: items in, items and events out, and nothing kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from polymodal.generation.params import GenerationParams
from polymodal.messages import assistant, system, user
from tests.serving.conftest import Running
from tests.serving.test_chat import client, parts_of, url
from tests.serving.test_forms import SCHEMA, TOOLS

HI: dict[str, Any] = {"model": "tiny", "input": "hi"}


def post(server: Running, **body: Any) -> Any:
    return httpx2.post(f"{server.url}/v1/responses", json={**HI, **body}, timeout=60, trust_env=False)


def test_an_answer_is_the_models_own(tiny: Running) -> None:
    asked = [
        {"role": "user", "content": "One?"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Two."}]},
        {"role": "user", "content": [{"type": "input_text", "text": "What?"}]},
    ]
    said = [system("Be brief."), user("One?"), assistant("Two."), user("What?")]
    expected = tiny.backend.generate(said, GenerationParams(max_new_tokens=10))
    answer = client(tiny).responses.create(
        model="tiny", input=asked, instructions="Be brief.", max_output_tokens=10, store=False
    )
    assert answer.output_text == expected.text and answer.instructions == "Be brief."
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (expected.usage.prompt_tokens, 10)
    # What was answered goes back as the client's own object has it.
    again = [*asked, *(item.model_dump() for item in answer.output), {"role": "user", "content": "And?"}]
    assert client(tiny).responses.create(model="tiny", input=again).output_text


@pytest.mark.parametrize("kind", ["image", "audio", "pdf"])
def test_media(kind: str, tiny: Running, tmp_path: Path) -> None:
    (part,), ours = parts_of(kind, tmp_path)
    written = {
        "image": lambda: {"type": "input_image", "image_url": part["image_url"]["url"], "detail": "auto"},
        "audio": lambda: part,
        "pdf": lambda: {"type": "input_file", **part["file"]},
    }[kind]()
    expected = tiny.backend.generate([user(*ours, "What?")], GenerationParams(max_new_tokens=12))
    content = [written, {"type": "input_text", "text": "What?"}]
    answer = client(tiny).responses.create(model="tiny", input=[{"role": "user", "content": content}])
    assert answer.output_text == expected.text and answer.usage.input_tokens == expected.usage.prompt_tokens


def test_events_come_in_order_and_add_up(tiny: Running) -> None:
    whole = client(tiny).responses.create(**HI, max_output_tokens=8)
    events = list(client(tiny).responses.create(**HI, max_output_tokens=8, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert kinds == [
        "created", "in_progress", "output_item.added", "content_part.added", *["output_text.delta"] * deltas,
        "output_text.done", "content_part.done", "output_item.done", "incomplete",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type.endswith("delta")) == whole.output_text
    last = events[-1].response
    assert last.output_text == whole.output_text and last.usage.total_tokens == whole.usage.total_tokens
    assert last.usage.input_tokens_details.cached_tokens == last.usage.input_tokens - 1  # the question was read before
    assert len({event.item_id for event in events if hasattr(event, "item_id")}) == 1
    assert last.output[0].id == events[4].item_id and events[0].response.id == last.id


def test_a_stream_that_ends_by_itself(told: Callable[..., Any]) -> None:
    model, server = told()
    model.steps.release(1000)
    with client(server).responses.stream(**HI, max_output_tokens=3) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == "word word word " and final.status == "completed"
    assert kinds[-1] == "response.completed"
    model.fault = RuntimeError("secret")
    answer = post(server, stream=True)
    assert answer.status_code == 500 and "secret" not in answer.text  # nothing had been said yet


def test_a_schema(tiny: Running) -> None:
    text = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}}
    answer = client(tiny).responses.create(**HI, text=text, max_output_tokens=64)
    assert json.loads(answer.output_text)["kind"] in ("cat", "dog") and answer.status == "completed"
    told = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 3}
    (part,) = client(tiny).responses.create(**HI, **told).output[0].content
    assert len(part.logprobs) == 3 and all(len(one.top_logprobs) == 2 for one in part.logprobs)


def test_functions(tooled: Running) -> None:
    tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
    asked: list[Any] = [{"role": "user", "content": "hi"}]
    how: dict[str, Any] = {"model": "tiny", "tools": tools, "max_output_tokens": 128}
    choice = {"type": "function", "name": "weather"}
    answer = client(tooled).responses.create(**how, input=asked, tool_choice=choice)
    (call,) = answer.output
    assert call.type == "function_call" and call.name == "weather"
    assert json.loads(call.arguments)["city"] in ("Oslo", "Rome") and answer.status == "completed"
    events = list(client(tooled).responses.create(**how, input=asked, tool_choice=choice, stream=True))
    assert [event.type.removeprefix("response.") for event in events] == [
        "created", "in_progress", "output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
        "output_item.done", "completed",
    ]  # fmt: skip
    assert events[-1].response.output[0].arguments == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "3 degrees"}
    after = client(tooled).responses.create(**how, input=[*asked, call.model_dump(), result])
    assert after.usage.input_tokens > answer.usage.input_tokens
    missing = post(tooled, input=[*asked, call.model_dump(), *asked])
    assert missing.status_code == 400 and missing.json()["error"]["param"] == "input[2].role"


@pytest.mark.parametrize(
    ("body", "place"),
    [
        *(({name: value}, name) for name, value in (
            ("store", True), ("previous_response_id", "resp_1"), ("conversation", "conv_1"), ("background", True),
            ("input", []), ("input", 5), ("max_output_tokens", 0), ("max_output_tokens", 10**6), ("temperature", 3),
            ("reasoning", {"effort": "low"}), ("truncation", "auto"), ("prompt", {"id": "x"}), ("top_logprobs", 21),
            ("max_tool_calls", 1), ("messages", []), ("banana", 1))),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "name": "f"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"include": ["reasoning.encrypted_content"]}, "include[0]"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_object", "name": "x"}}}, "text.format.name"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "banana"}}}}, "text.format"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "assistant", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "output_text", "text": "x"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "x"}]}]},
         "input[0].content[0].file_id"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].image_url"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "https://a.example/b.png"}]}]},
         "input[0].content[0].image_url"),
        ({"input": [{"role": "user", "content": [
            {"type": "input_image", "image_url": url(b"no image", "image/png")}]}]}, None),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "x"}]}, "input[0].role"),
    ],
)  # fmt: skip
def test_what_is_refused(body: dict[str, Any], place: str | None, tiny: Running) -> None:
    answer = post(tiny, **body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == place or place is None, error
    assert place is not None or error["param"].startswith("input[0].content[0]"), error


def test_remarks_and_the_models_name(tiny: Running) -> None:
    remarks = {"user": "u", "metadata": {"a": "b"}, "service_tier": "auto", "prompt_cache_key": "k", "include": []}
    answer = post(tiny, **remarks).json()
    assert answer["metadata"] == {"a": "b"} and answer["store"] is False and answer["status"] == "incomplete"
    assert post(tiny, model="other").status_code == 404
    with pytest.raises(openai.BadRequestError):
        client(tiny).responses.create(**HI, previous_response_id="resp_1")
