"""Answers that follow a schema: always JSON that meets it, and schemas that cannot be followed in bounded time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llguidance")

from polymodal.backends import load
from polymodal.backends.base import ModelBackend
from polymodal.errors import ConfigError
from polymodal.generation.params import GenerationParams

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "count": {"type": "integer", "minimum": 1, "maximum": 30}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> ModelBackend[Any]:
    backend = load(tiny_model_folder, "cpu")
    assert isinstance(backend, ModelBackend)
    return backend


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_an_answer_meets_its_schema(model: ModelBackend[Any], temperature: float) -> None:
    params = GenerationParams(max_new_tokens=100, response_schema=SCHEMA, temperature=temperature, seed=2)
    reply = model.generate("hi", params)
    said = json.loads(reply.text)
    assert said["kind"] in ("cat", "dog") and 1 <= said["count"] <= 30 and reply.finish_reason == "stop"
    assert reply.text == json.dumps(said)
    batch = model.generate_batch(["hi", "what?"], params)
    assert batch[0] == reply.text and json.loads(batch[1]).keys() == said.keys()


def test_an_answer_follows_a_grammar(model: ModelBackend[Any]) -> None:
    params = GenerationParams(max_new_tokens=100, grammar='start: "yes" | "no"')
    assert model.generate("hi", params).text in ("yes", "no")


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"type": "banana"}, "Invalid type"),
        ({"$ref": "#"}, "cannot be followed"),
        ({"$ref": "http://127.0.0.1:9/x.json"}, "cannot be followed"),
        ({"type": "string", "pattern": "(?=a)b"}, "cannot be followed"),
        ({"type": "integer", "minimum": 10**30}, "cannot be followed"),
        ({"enum": ["x" * 1000] * 1000}, "at most 65,536"),
        ({"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(2000)}}, "too hard"),
    ],
)
def test_schemas_that_cannot_be_followed(model: ModelBackend[Any], schema: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as error:
        model.generate("hi", GenerationParams(response_schema=schema))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^(a+)+$"},
        {"type": "string", "pattern": "(a{1,1000}){1,1000}$"},
        {"type": "array", "minItems": 10**9, "items": {"type": "integer"}},
        {"type": "object", "properties": {"child": {"$ref": "#"}}},
        {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(400)}},
    ],
)
def test_hard_schemas_take_bounded_time(model: ModelBackend[Any], schema: dict[str, Any]) -> None:
    begin = time.monotonic()
    model.generate("hi", GenerationParams(response_schema=schema, max_new_tokens=5))
    assert time.monotonic() - begin < 20
