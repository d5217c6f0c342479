"""Calls of tools: each template's own form is found, read back from an answer's text, and forced by a grammar."""

from __future__ import annotations

import json

import pytest

from polymodal.processing.chat_template.calls import CallForm, find_form
from tests.processing.test_places import CLOCK, WEATHER, make_template, make_tokenizer

HERMES = CallForm("<tool_call>\n", "\n</tool_call>", "name", "arguments", False)
BARE = CallForm("", "", "name", "parameters", False)
LISTED = CallForm("", "", "name", "arguments", True)
NAMES = ["get_weather", "clock"]


@pytest.mark.parametrize(
    ("name", "form"),
    [("qwen2.5", HERMES), ("qwen3", HERMES), ("llama3.1", BARE), ("mistral", LISTED), ("deepseek", None),
     ("harmony", None)],
)  # fmt: skip
def test_the_form_of_each_template(name: str, form: CallForm | None) -> None:
    assert find_form(make_template(name), make_tokenizer(name)) == form


def one(form: CallForm, name: str, **arguments: object) -> str:
    call = json.dumps({form.name: name, form.arguments: arguments})
    return f"{form.before}{f'[{call}]' if form.listed else call}{form.after}"


@pytest.mark.parametrize("form", [HERMES, BARE, LISTED])
def test_calls_are_read_back(form: CallForm) -> None:
    said, calls = form.read(one(form, "get_weather", city="Å <b>"), NAMES)
    assert said == "" and [call["function"]["name"] for call in calls] == ["get_weather"]
    assert json.loads(calls[0]["function"]["arguments"]) == {"city": "Å <b>"} and len(calls[0]["id"]) == 9
    for text in ("", "Hello {you}", "[1]", "{}", one(form, "rm", a=1), one(form, "clock")[:-3] + "!!"):
        assert form.read(text, NAMES) == (text, [])


def test_text_beside_calls_and_several() -> None:
    text = f"I look.\n{one(HERMES, 'get_weather', city='Oslo')}\n{one(HERMES, 'clock')}"
    said, calls = HERMES.read(text, NAMES)
    assert said == "I look." and [call["function"]["name"] for call in calls] == NAMES
    two = '[{"name": "clock", "arguments": {}}, {"name": "clock", "arguments": {}}]'
    assert len(LISTED.read(two, NAMES)[1]) == 2


def test_text_is_held_back_where_a_call_may_begin() -> None:
    assert HERMES.begins("Hi <tool_") == 3 and HERMES.begins("a < b") == 5 and HERMES.begins("x<tool_call>\n{") == 1
    assert BARE.begins(' {"na') == 1 and BARE.begins("Hi {") == 4 and BARE.begins(" ") == 1 and LISTED.begins("{") == 1


def test_a_grammar_of_calls() -> None:
    guidance = pytest.importorskip("llguidance")
    for form in (HERMES, BARE, LISTED):
        for tools in ([WEATHER], [WEATHER, CLOCK]):
            made = guidance.LLMatcher.grammar_from_lark(form.grammar(tools))
            assert guidance.LLMatcher.validate_grammar(made) == ""
