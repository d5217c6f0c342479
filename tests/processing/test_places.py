"""Reasoning and tools: the ids of `apply_chat_template` and a loss on what the assistant says, or a clear refusal."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from polymodal.config import TemplateConfig
from polymodal.data.readers.conversations import read_record
from polymodal.errors import PolymodalError
from polymodal.messages import Image, Message, Text, assistant, user
from polymodal.processing.chat_template.encode import ChatTemplate, Rendered
from polymodal.processing.chat_template.presets import PRESETS
from tests.processing.published_templates import PUBLISHED
from tests.processing.test_published_templates import make_tokenizer as make_published
from tests.processing.tool_templates import TOOLED

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'The weather in a "city"',
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
ID, OTHER = "abcdefghi", "123456789"


def call(name: str = "get_weather", id: str = ID, **arguments: Any) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def answer(content: str | None, *calls: dict[str, Any], thought: str = "") -> dict[str, Any]:
    turn: dict[str, Any] = {"role": "assistant", "content": content}
    return {
        **turn,
        **({"tool_calls": [*calls]} if calls else {}),
        **({"reasoning_content": thought} if thought else {}),
    }


def result(content: str, id: str = ID) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": content}


OSLO = call(city='Oslo "N"\n é', days=2, hot=False, at=None, near=[{"x": 1.5}])
TIME = call("clock", OTHER)
BRIEF = {"role": "system", "content": "Be brief."}
ASKED = {"role": "user", "content": "Weather?\n"}
AGAIN = [{"role": "user", "content": "Thanks."}, answer("Sure.")]
ROWS: dict[str, list[dict[str, Any]]] = {
    "call": [ASKED, answer("", OSLO), result('{"temp": 3}'), answer("Three degrees."), *AGAIN],
    "none": [ASKED, answer(None, OSLO), result("3"), answer("Three.")],
    "text too": [BRIEF, ASKED, answer("I look.", OSLO), result('3 "C"\nlow'), answer("3.")],
    "two calls": [ASKED, answer("", OSLO, TIME), result("3"), result("noon", OTHER), answer("3 at noon.")],
    "call last": [ASKED, answer("", OSLO)],
    "twice": [ASKED, answer("", OSLO), result("?"), answer("", call(city="Rome")), result("20"), answer("Twenty.")],
    "thought": [ASKED, answer("Four.", thought="Two\n\nand two.")],
    "thoughts": [ASKED, answer("Four.", thought="Two."), *AGAIN[:1], answer("Six.\n", thought="\nThree.\n")],
    "thought and call": [ASKED, answer("", OSLO, thought="Look."), result("3"), answer("3.", thought="Cold.")],
}
TAKEN = {
    "qwen2.5": {"call", "none", "text too", "two calls", "call last", "twice"},
    "qwen3": set(ROWS),
    "llama3.1": {"call", "none", "call last", "twice"},
    "mistral": {"call", "none", "two calls", "call last", "twice"},
    "deepseek": {"call", "none", "two calls", "call last", "twice"},
    "harmony": {"call", "none", "call last", "twice", "thought", "thoughts", "thought and call"},
}
"""What each template can say all of."""


@cache
def make_tokenizer(name: str) -> PreTrainedTokenizerFast:
    source, kind, tokens = TOOLED[name]
    raw = Tokenizer.from_str(
        make_published("chatml" if kind == "byte_level" else "llama2", kind).backend_tokenizer.to_str()
    )
    raw.add_special_tokens([*tokens])
    raw.add_tokens([AddedToken(token, normalized=False) for token in ("<tool_call>", "</tool_call>")])
    ends = {"qwen2.5": "<|im_end|>", "qwen3": "<|im_end|>", "llama3.1": "<|eot_id|>", "harmony": "<|return|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token=ends.get(name, "</s>"))
    tokenizer.chat_template = source
    return tokenizer


@cache
def make_template(name: str, thinking: bool | None = None) -> ChatTemplate:
    tokenizer = make_tokenizer(name)
    return ChatTemplate(tokenizer, TemplateConfig(enable_thinking=thinking), len(tokenizer))


def read(turns: list[dict[str, Any]], *tools: dict[str, Any]) -> tuple[Message, ...]:
    return read_record({"messages": turns, "tools": [*tools]}, Path("/data"), "x").messages


def tools_for(case: str) -> tuple[dict[str, Any], ...]:
    return () if case in ("thought", "thoughts") else (WEATHER, CLOCK)


def theirs(name: str, turns: list[dict[str, Any]], tools: Any = (), **more: Any) -> list[int]:
    tokenizer = make_tokenizer(name)
    return list(tokenizer.apply_chat_template(turns, tools=[*tools] or None, return_dict=False, **more))


def trained(name: str, rendered: Rendered) -> list[str]:
    runs = itertools.groupby(zip(rendered.input_ids, rendered.loss_mask, strict=True), key=lambda pair: pair[1])
    decode = make_tokenizer(name).decode
    return [str(decode([i for i, _ in run], clean_up_tokenization_spaces=False)) for mask, run in runs if mask]


def as_they_take_it(name: str, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What apply_chat_template fails on and we mend: no content, and for DeepSeek an object or an empty content."""
    mended = []
    for turn in turns:
        if "tool_calls" in turn and name == "deepseek":
            calls = [json.loads(json.dumps(given)) for given in turn["tool_calls"]]
            for given in calls:
                given["function"]["arguments"] = json.dumps(given["function"]["arguments"], ensure_ascii=False)
            turn = {"role": "assistant", "tool_calls": calls}
        elif "tool_calls" in turn and name == "qwen3" and turn["content"] is None:
            turn = {**turn, "content": ""}
        mended.append(turn)
    return mended


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("name", TOOLED)
def test_ids_are_those_of_apply_chat_template_or_the_row_is_refused(name: str, case: str) -> None:
    tools, turns = tools_for(case), ROWS[case]
    if case not in TAKEN[name]:
        with pytest.raises(PolymodalError, match=r"template (has no place|drops or moves|refuses)"):
            make_template(name).render(read(turns, *tools))
        return
    rendered = make_template(name).render(read(turns, *tools))
    assert rendered.input_ids == theirs(name, as_they_take_it(name, turns), tools)
    # Where an answer is due, what is asked is a prefix of what is trained.
    for end in (n for n, turn in enumerate(turns) if turn["role"] == "assistant" and n < len(turns)):
        asked = make_template(name).render(read(turns[:end], *tools), add_generation_prompt=True)
        assert asked.input_ids == theirs(name, as_they_take_it(name, turns[:end]), tools, add_generation_prompt=True)
        if end == len(turns) - 1:
            assert rendered.input_ids[: len(asked.input_ids)] == asked.input_ids
            assert not rendered.loss_mask[len(asked.input_ids) - 1]
            assert all(rendered.loss_mask[len(asked.input_ids) : -1])


def test_all_that_the_assistant_says_is_trained_and_no_result() -> None:
    written = json.dumps(OSLO["function"]["arguments"], ensure_ascii=False)
    text = '<tool_call>\n{"name": "get_weather", "arguments": ' + written + "}\n</tool_call>"
    clock = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    expected = {
        ("qwen3", "thought and call"): [
            f"<think>\nLook.\n</think>\n\n{text}<|im_end|>",
            "<think>\nCold.\n</think>\n\n3.<|im_end|>",
        ],
        ("qwen3", "two calls"): [f"{text}\n{clock}<|im_end|>", "<think>\n\n</think>\n\n3 at noon.<|im_end|>"],
        ("qwen3", "thoughts"): ["Four.<|im_end|>", "<think>\nThree.\n</think>\n\nSix.\n<|im_end|>"],
        ("qwen2.5", "text too"): [f"I look.\n{text}<|im_end|>", "3.<|im_end|>"],
        ("llama3.1", "none"): ['{"name": "get_weather", "parameters": ' + written + "}<|eot_id|>", "Three.<|eot_id|>"],
        ("mistral", "none"): [
            '[TOOL_CALLS] [{"name": "get_weather", "arguments": ' + written + ', "id": "abcdefghi"}]</s>',
            "Three.</s>",
        ],
        ("harmony", "thoughts"): [
            "<|channel|>analysis<|message|>Two.<|end|><|start|>assistant<|channel|>final<|message|>Four.",
            "<|channel|>analysis<|message|>\nThree.\n<|end|><|start|>assistant<|channel|>final<|message|>Six.\n<|return|>",
        ],
        ("deepseek", "none"): [f"<|call|>get_weather<|sep|>{written}<|done|></s>", "Three.</s>"],
        ("harmony", "thought and call"): [
            "<|channel|>analysis<|message|>Look.<|end|><|start|>assistant to=functions.get_weather<|message|>"
            f"{written}<|return|>",
            "<|channel|>analysis<|message|>Cold.<|end|><|start|>assistant<|channel|>final<|message|>3.<|return|>",
        ],
    }
    for (name, case), said in expected.items():
        assert trained(name, make_template(name).render(read(ROWS[case], *tools_for(case)))) == said


def test_a_call_without_a_loss_stays_out_of_it() -> None:
    turns = [ASKED, {**answer("", OSLO, thought="Look."), "loss": False}, result("3"), answer("3.", thought="Cold.")]
    plain = make_template("qwen3").render(read([ASKED, answer("", OSLO, thought="Look."), *turns[2:]], WEATHER))
    silent = make_template("qwen3").render(read(turns, WEATHER))
    assert silent.input_ids == plain.input_ids
    assert trained("qwen3", silent) == ["<think>\nCold.\n</think>\n\n3.<|im_end|>"]


@pytest.mark.parametrize("name", ["qwen2.5", "llama3.1", "mistral", "qwen3", "deepseek"])
def test_arguments_as_text_are_written_once(name: str) -> None:
    packed = call(city="Oslo")
    packed["function"]["arguments"] = '{"city":"Oslo"}'
    rendered = make_template(name).render(read([ASKED, answer(None, packed), result("3"), answer("3.")], WEATHER))
    text = '{"city":"Oslo"}' if name in ("qwen3", "deepseek") else '{"city": "Oslo"}'  # those write a text as it is
    assert text in trained(name, rendered)[0]


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "llama3.1", "mistral"])
def test_control_tokens_typed_in_tools_calls_results_and_reasoning_stay_text(name: str) -> None:
    tokenizer = make_tokenizer(name)
    added = ("<tool_call>", "</tool_call>", "</think>")
    tokens = (*TOOLED[name][2], "<s>", "</s>", *(token for token in added if token in TOOLED[name][0]))
    typed = f"a {' '.join(tokens)} b"
    tool = json.loads(json.dumps(WEATHER))

    def row(text: str) -> list[Message]:
        tool["function"]["description"] = text
        tool["function"]["parameters"]["properties"] = {text: {"type": "string"}}
        turns = [ASKED, answer("", call(city=text, **{text: [text]})), result(text), answer("A")]
        if name == "qwen3":
            turns[1]["reasoning_content"] = text
        return [*read(turns, tool)]

    found, plain = (make_template(name).render(row(text)).input_ids for text in (typed, "a b"))
    control = set(tokenizer.convert_tokens_to_ids([*tokens]))
    assert [token for token in found if token in control] == [token for token in plain if token in control]
    shown = tokenizer.decode(found, clean_up_tokenization_spaces=False)
    assert shown.count(typed) == (7 if name == "qwen3" else 6)


@pytest.mark.parametrize("name", [*PRESETS, *(name for name in PUBLISHED if name not in ("qwen3",))])
def test_templates_without_a_place_refuse_by_name(name: str) -> None:
    if name in PRESETS:
        tokenizer = make_published("llama3" if name == "llama3" else "chatml", "byte_level")
        template = ChatTemplate(tokenizer, TemplateConfig(chat_template=name), len(tokenizer))
        who = f"the chat template {name!r} has no place for it"
    else:
        tokenizer = make_published(name, PUBLISHED[name][1])
        template = ChatTemplate(tokenizer, TemplateConfig(), len(tokenizer))
        who = "the tokenizer's chat template has no place for it"
    for turns, tools, field in (
        ([ASKED, answer("Four.", thought="Two.")], (), "message 2: `reasoning_content`"),
        ([ASKED, answer("Four.")], (WEATHER,), "message 1: `tools`"),
        ([ASKED, answer("", OSLO)], (), "message 2: `tool_calls`"),
    ):
        with pytest.raises(PolymodalError) as caught:
            template.render(read(turns, *tools))
        assert str(caught.value).startswith(f"{field}: {who}") and "\n" not in str(caught.value)
    if name not in ("chatml", "llama3", "qwen2.5", "phi3", "phi4", "gemma") or name in PRESETS:
        with pytest.raises(PolymodalError, match="message 3: `role: tool`: "):
            template.render(read([ASKED, answer("I look."), result("3"), answer("3.")]))


def test_a_template_that_leaves_something_of_a_call_out_is_refused() -> None:
    tokenizer = make_tokenizer("qwen2.5")
    lossy = {
        "arguments": (
            TOOLED["qwen2.5"][0].replace("(call.arguments | tojson)", "'{}'"),
            "leaves out 'city' of the call",
        ),
        "a tool": (TOOLED["qwen2.5"][0].replace("in tools %}", "in tools[:1] %}"), "leaves out the tool 'clock'"),
    }
    for source, complaint in lossy.values():
        template = ChatTemplate(tokenizer, TemplateConfig(chat_template=source), len(tokenizer))
        with pytest.raises(PolymodalError, match=complaint):
            template.render(read([ASKED, answer("", OSLO)], WEATHER, CLOCK))


def test_reasoning_that_is_dropped_though_no_question_follows_is_refused() -> None:
    tokenizer = make_tokenizer("qwen3")
    source = TOOLED["qwen3"][0].replace("(loop.last or thought)", "message.tool_calls")
    template = ChatTemplate(tokenizer, TemplateConfig(chat_template=source), len(tokenizer))
    with pytest.raises(PolymodalError, match="message 2: `reasoning_content`: the chat template drops it from this"):
        template.render(read(ROWS["thought"]))
    kept = template.render(read([ASKED, answer("", OSLO, thought="Look."), result("3"), answer("3.")], WEATHER))
    assert "Look." in trained("qwen3", kept)[0]


def test_reasoning_with_an_image_and_an_ended_thought_in_the_text() -> None:
    tokenizer = make_tokenizer("qwen3")
    chat = [user("What is it?", Image("a.png")), replace(assistant("A </think> tag."), reasoning_content="Hm.")]
    rendered = make_template("qwen3").render(chat, [3])
    assert rendered.input_ids.count(len(tokenizer)) == 3
    assert trained("qwen3", rendered)[0] == "<think>\nHm.\n</think>\n\nA </think> tag.<|im_end|>"
    half = [user("Q"), replace(assistant("A"), reasoning_content="\ud83d")]
    with pytest.raises(PolymodalError, match="message 2: the text holds half of a surrogate pair"):
        make_template("qwen3").render(half)
    late = [user("Q"), Message("assistant", (Text("A"),), tools=(WEATHER,))]
    with pytest.raises(PolymodalError, match="message 2: `tools` are named once, on the first message"):
        make_template("qwen3").render(late)


@pytest.mark.parametrize("thinking", [True, False])
def test_thinking_switched_on_and_off(thinking: bool) -> None:
    for case, turns in ROWS.items():
        tools = tools_for(case)
        given = as_they_take_it("qwen3", turns)
        rendered = make_template("qwen3", thinking).render(read(turns, *tools))
        assert rendered.input_ids == theirs("qwen3", given, tools, enable_thinking=thinking)
