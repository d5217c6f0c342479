"""Texts that are gone on from: those of the model itself, one or several, as text or as ids."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
import torch

from polymodal.generation.generate import generate_ids
from polymodal.generation.params import GenerationParams
from polymodal.generation.streaming import decode_ids, spelt
from polymodal.processing.collate import Sample, collate
from tests.serving.conftest import CONTEXT, Running
from tests.serving.test_chat import client


def post(server: Running, **body: Any) -> Any:
    url = f"{server.url}/v1/completions"
    return httpx2.post(url, json={"model": "tiny", "prompt": "Hi", **body}, timeout=60, trust_env=False)


def gone_on(server: Running, ids: list[int], count: int) -> str:
    backend: Any = server.backend
    batch = collate([Sample(torch.tensor(ids), torch.zeros(len(ids), dtype=torch.bool))], 0, "left")
    params = GenerationParams(max_new_tokens=count)
    (made,) = generate_ids(backend.model, batch, params, backend.stop_ids, len(backend.tokenizer))
    start = len(decode_ids(backend.tokenizer, ids))
    return decode_ids(backend.tokenizer, [*ids, *made])[start:]


def test_a_text_is_gone_on_from(tiny: Running) -> None:
    ids = tiny.backend.tokenizer("Once upon a").input_ids
    expected = gone_on(tiny, ids, 10)
    answer = client(tiny).completions.create(model="tiny", prompt="Once upon a", max_tokens=10)
    assert answer.choices[0].text == expected and answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 10)
    assert client(tiny).completions.create(model="tiny", prompt=ids, max_tokens=10).choices == answer.choices
    chunks = list(client(tiny).completions.create(model="tiny", prompt=ids, max_tokens=10, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length"


def test_several_prompts_and_answers(tiny: Running) -> None:
    alone = [client(tiny).completions.create(model="tiny", prompt=text, max_tokens=6) for text in ("One", "Two")]
    asked: dict[str, Any] = {"model": "tiny", "prompt": ["One", "Two"], "max_tokens": 6, "n": 2}
    both = client(tiny).completions.create(**asked)
    texts = [choice.text for choice in both.choices]
    assert texts == [alone[0].choices[0].text] * 2 + [alone[1].choices[0].text] * 2
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone)
    assert both.usage.completion_tokens == 24
    stream = client(tiny).completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert chunks[-1].usage == both.usage
    told = [(chunk.choices[0].index, chunk.choices[0].text) for chunk in chunks[:-1]]
    assert ["".join(text for index, text in told if index == place) for place in range(4)] == texts


def test_names_of_special_tokens_are_text(tiny: Running) -> None:
    answer = post(tiny, prompt="<|im_end|>", max_tokens=1).json()
    assert answer["usage"]["prompt_tokens"] > 5


def test_logprobs(tiny: Running) -> None:
    (choice,) = client(tiny).completions.create(model="tiny", prompt="Once", max_tokens=6, logprobs=3).choices
    told = choice.logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset) == 6
    # Greedy: the token is the likeliest; names that are half a character may stand for several.
    assert all(
        max(top.values()) == pytest.approx(p) for top, p in zip(told.top_logprobs, told.token_logprobs, strict=True)
    )


def test_what_is_refused(tiny: Running) -> None:
    image = tiny.backend.model.image_token_id
    for body, place in (
        ({"prompt": ""}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": ["a"] * 9}, "prompt"),
        ({"prompt": 5}, "prompt"), ({"prompt": [10**6]}, "prompt"), ({"prompt": [1, image]}, "prompt"),
        ({"prompt": [[1], [-1]]}, "prompt[1][0]"), ({"prompt": ["a", 5]}, "prompt[1]"), ({"prompt": "\ud800"}, None),
        ({"suffix": "x"}, "suffix"), ({"best_of": 2}, "best_of"), ({"echo": True}, "echo"),
        ({"logprobs": 6}, "logprobs"),
        ({"max_tokens": 10**6}, "max_tokens"), ({"prompt": "x" * 10**5}, "prompt"), ({"messages": []}, "messages"),
        ({"prompt": [5] * CONTEXT}, None), ({"model": "no"}, "model"),
    ):  # fmt: skip
        if body.get("prompt") == "\ud800":
            raw = b'{"model": "tiny", "prompt": "\\ud800"}'
            headers = {"Content-Type": "application/json"}
            answer = httpx2.post(f"{tiny.url}/v1/completions", content=raw, headers=headers, trust_env=False)
        else:
            answer = post(tiny, **body)
        assert answer.status_code == (404 if "model" in body else 400), (body, answer.text)
        assert place is None or answer.json()["error"]["param"] == place, answer.text
    assert post(tiny).status_code == 200


def test_models_that_answer_conversations_alone(told: Any) -> None:
    _, server = told()
    assert post(server).json()["error"]["param"] == "prompt"


def test_what_tokens_spell(tiny: Running) -> None:
    tokenizer = tiny.backend.tokenizer
    text = "Å b🙂"
    assert (
        b"".join(spelt(tokenizer, token) for token in tokenizer(text, add_special_tokens=False).input_ids)
        == text.encode()
    )
