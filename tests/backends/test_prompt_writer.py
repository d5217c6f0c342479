"""A language model writes what is to be drawn; here one that says what it is told to."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from polymodal.backends.prompt_writer import INSTRUCTION, write_request
from polymodal.errors import ConfigError, PolymodalError
from polymodal.generation.params import GenerationParams
from polymodal.messages import Image, assistant, system, user
from polymodal.modeling.renderers import RenderRequest
from tests.speech.engines import ScriptBackend

PROMPT = "a tabby cat on a beach, soft evening light"


def written(text: str, asked: Any = "Draw our cat!", **given: Any) -> RenderRequest:
    return write_request(ScriptBackend([text]), asked, given=given)


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        (f'{{"prompt": "{PROMPT}"}}', {}),
        (
            f'Sure!\n```json\n{{"prompt": "{PROMPT}", "negative_prompt": "text", "width": 512, "height": 384, '
            '"steps": 20, "seed": 7}\n```\nEnjoy {it}!',
            {"negative_prompt": "text", "width": 512, "height": 384, "steps": 20, "seed": 7},
        ),
        (f'{{"prompt": "{PROMPT}", "seed": null, "negative_prompt": "", "width": null, "height": null,}}', {}),
        (f"{{'prompt': '{PROMPT}', 'steps': 5, 'seed': None}}", {"steps": 5}),
        (f"{{'prompt': '{PROMPT}', 'steps': 5, 'seed': null}}", {"steps": 5}),
        (f'{{"request": {{"Prompt": "{PROMPT}", "Negative": "fog", "size": "640x480"}}}}',
         {"negative_prompt": "fog", "width": 640, "height": 480}),
        (f'{{"thought": "a cat"}} {{"prompt": "{PROMPT}", "width": "512", "height": 512.0, "style": "oil"}}',
         {"width": 512, "height": 512}),
        (f'{{"prompt": "{PROMPT}", "steps": 5', {"steps": 5}),
        ('{"prompt": "a tabby cat\non a beach,  soft evening light"}', {}),
    ],
    ids=["plain", "fenced", "null", "python", "half python", "nested", "second", "cut off", "line end"],
)  # fmt: skip
def test_what_a_model_may_write(text: str, fields: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert written(text) == RenderRequest(prompt=PROMPT, **fields)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A cat on a beach.",
        "{}",
        '{"prompt": ""}',
        '{"prompt": "..."}',
        '{"prompt": 7}',
        '{"prompt": ["a", "cat"]}',
        '{"prompt": "<the description>"}',
        "{" * 3000,
        '{"prompt": "a tabby cat on a be',
        f"{INSTRUCTION}",
        "[1, 2]",
        '{"prompt": null, "seed": 3}',
    ],
)
def test_without_a_request_the_users_own_words_are_drawn(text: str) -> None:
    with pytest.warns(UserWarning, match="script: wrote no request"):
        assert written(text, steps=9) == RenderRequest(prompt="Draw our cat!", steps=9)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ('"steps": 0', "steps"),
        ('"steps": 10000000', "steps"),
        ('"seed": -1', "seed"),
        ('"seed": 1.5', "seed"),
        ('"seed": NaN', "seed"),
        ('"width": 500, "height": 512', "width"),
        ('"width": 512', "width and height"),
        ('"size": "99999x8"', "width"),
        ('"negative_prompt": {"a": 1}', "negative_prompt"),
    ],
)
def test_values_out_of_range_are_left_out_and_said(values: str, word: str) -> None:
    with pytest.warns(UserWarning, match=f"script: .*{word}.*left out") as said:
        assert written(f'{{"prompt": "{PROMPT}", {values}}}') == RenderRequest(prompt=PROMPT)
    assert len(said) == 1


def test_booleans_are_no_numbers() -> None:
    assert written(f'{{"prompt": "{PROMPT}", "seed": true, "steps": true}}') == RenderRequest(prompt=PROMPT)


def test_a_long_prompt_is_one_that_can_be_drawn() -> None:
    assert len(written(f'{{"prompt": "{"cat " * 5000}"}}').prompt) == 10_000


def test_what_the_user_settled_is_not_the_models_to_choose() -> None:
    text = f'{{"prompt": "{PROMPT}", "width": 512, "height": 512, "seed": 3}}'
    found = written(text, width=64, height=32, steps=4, negative_prompt=None)
    assert found == RenderRequest(prompt=PROMPT, width=64, height=32, steps=4, seed=3)
    with pytest.raises(ConfigError, match="steps"):
        written(text, steps=-1)


def test_the_model_reads_the_conversation() -> None:
    backend = ScriptBackend([f'{{"prompt": "{PROMPT}"}}'])
    messages = [system("S"), user(Image("cat.jpg"), "This is Tom."), assistant("A fine cat."), user("Draw him!")]
    write_request(backend, messages)
    ((asked, params),) = backend.asked
    assert asked[:3] == messages[:3] and asked[3].text == f"Draw him!\n\n{INSTRUCTION}"
    assert params.temperature == 0 and params.max_new_tokens == 256
    chosen = GenerationParams(temperature=0.5)
    write_request(backend, messages, chosen)
    assert backend.asked[1][1] is chosen
    with pytest.raises(PolymodalError, match="user message"):
        write_request(backend, messages[:3])


def test_a_wish_without_words() -> None:
    with pytest.warns(UserWarning), pytest.raises(ConfigError, match="empty"):
        written("no idea", [user(Image("cat.jpg"))])
