"""The language model writes what a renderer is asked: it reads the conversation and gives a request as JSON.

request = write_request(polymodal.load("default"), "Our cat loves the sea. Draw that!")
image = load_renderer("some/pipeline").render(request)
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image as PILImage

from polymodal.backends import load_renderer
from polymodal.backends.base import Backend, require_question
from polymodal.errors import ConfigError
from polymodal.generation.params import GenerationParams
from polymodal.messages import Conversation, Image, Message, Part, Text, assistant
from polymodal.modeling.renderers.base import LONGEST_PROMPT, RenderRequest

INSTRUCTION = """Do not answer the above; write a request for an image generator that draws what is wanted there. It
has not read the conversation: describe the whole image in at most 50 words, with subject, surroundings, style and
light, and name what was only referred to. Answer with one JSON object and nothing else:
{"prompt": "<the description>", "negative_prompt": "<what must not be seen, or empty>", "width": <pixels or null>,
"height": <pixels or null>, "steps": null, "seed": <a whole number or null>}""".replace("\n", " ")

_NAMES = {"negative": "negative_prompt", "negativeprompt": "negative_prompt", "description": "prompt",
          "num_inference_steps": "steps"}  # fmt: skip
_FIELDS = ("prompt", "negative_prompt", "width", "height", "steps", "seed")
_SIZE = re.compile(r"\s*(\d{1,5})\s*[x×*]\s*(\d{1,5})\s*")


def write_request(
    backend: Backend,
    messages: Conversation,
    params: GenerationParams | None = None,
    given: Mapping[str, Any] | None = None,
) -> RenderRequest:
    """Have a model write what is to be drawn.

    Args:
        backend: The model.
        messages: The conversation, which ends with the user's wish.
        params: How it is sampled; greedy, 256 tokens at most, where None.
        given: Fields of the request that the user has settled, such as `width`; they are not the model's to choose.

    Returns:
        The request. Where the model writes no JSON with a prompt, the user's own words are the prompt, with a warning;
        a value out of range is left out, with a warning.

    Raises:
        ConfigError: A field in `given` is out of range, or there are no words to draw.
    """
    asked = require_question(messages)
    last = replace(asked[-1], parts=(*asked[-1].parts, Text(f"\n\n{INSTRUCTION}")))
    text = backend.generate([*asked[:-1], last], params or GenerationParams(max_new_tokens=256)).text
    fixed = {name: value for name, value in (given or {}).items() if value is not None}
    words = asked[-1].text.strip()[:LONGEST_PROMPT]
    found = _fields(text)
    prompt = found.pop("prompt", None)
    # Small models repeat what they are shown.
    if not isinstance(prompt, str) or not any(map(str.isalnum, prompt)) or prompt.strip() in INSTRUCTION:
        shown = text.strip()[:80]
        warnings.warn(f"{backend.name}: wrote no request ({shown!r}); the user's words are drawn", stacklevel=2)
        return RenderRequest(**{"prompt": words, **fixed})
    request = {"prompt": " ".join(prompt.split())[:LONGEST_PROMPT]}
    request |= _within(found, backend.name)
    return RenderRequest(**(request | fixed))


def draw(model: Backend, messages: Sequence[Message], parts: Sequence[Part], params: GenerationParams) -> Image:
    """An image for a conversation; the expert for "image" of `polymodal.backends.base.EXPERTS`."""
    renderer = load_renderer(model.experts.get("image"))
    model.experts = {**model.experts, "image": renderer}
    if renderer.output != "image":
        raise ConfigError(f"{renderer.name}: makes {renderer.output}, and an image is asked for")
    given: dict[str, Any] = {} if params.seed is None else {"seed": params.seed % 2**63}
    if renderer.conversational:
        request = RenderRequest(prompt=messages[-1].text.strip()[:LONGEST_PROMPT], **given)
    else:
        said = [part for part in parts if isinstance(part, Text) and part.text.strip()]
        asked = [*messages, assistant(*said), messages[-1]] if said else messages
        request = write_request(model, asked, given=given)
    return Image(PILImage.fromarray(renderer.render(request)))


def _within(found: dict[str, Any], name: str) -> dict[str, Any]:
    """Those of a model's values that a request may have; a size whose one side cannot be used is none."""
    kept: dict[str, Any] = {}
    sizes: dict[str, Any] = {side: found.pop(side) for side in ("width", "height") if side in found}
    single: list[dict[str, Any]] = [{key: value} for key, value in found.items()]
    for values in [*single, sizes]:
        try:
            if values:
                RenderRequest(prompt="-", **values)
                kept |= values
        except ConfigError as error:
            warnings.warn(f"{name}: {str(error).partition(': ')[2]}; left out", stacklevel=3)
    return kept


def _fields(text: str) -> dict[str, Any]:
    """The fields of the first object in a model's answer that has a prompt; none where there is none."""
    for start in [match.start() for match in re.finditer(r"\{", text)][:20]:
        found = _object(text[start:])
        inner = (found.get(key) for key in ("request", "arguments", "parameters"))
        found = next((one for one in inner if isinstance(one, dict)), found)
        named = {_NAMES.get(key.strip().lower(), key.strip().lower()): value for key, value in found.items()}
        if isinstance(size := named.get("size"), str) and (sides := _SIZE.fullmatch(size)):
            named = {"width": int(sides[1]), "height": int(sides[2]), **named}
        if "prompt" in named:
            said = {name: named[name] for name in _FIELDS if named.get(name) not in (None, "", "null")}
            return {name: value for name, value in said.items() if not isinstance(value, bool)}
    return {}


def _object(text: str) -> dict[str, Any]:
    """The object that a text begins with, though it has Python's quotes, a comma too many, or lacks its end."""
    try:
        return json.JSONDecoder(strict=False).raw_decode(text)[0]
    except (ValueError, RecursionError):
        pass
    whole = text[: text.find("}") + 1] if "}" in text else f"{text.rstrip().rstrip(',')}" + "}"
    for attempt in (re.sub(r",\s*}", "}", whole), re.sub(r"\bnull\b", "None", whole)):
        for read in (lambda t: json.loads(t, strict=False), ast.literal_eval):
            try:
                found = read(attempt)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(found, dict) and all(isinstance(key, str) for key in found):
                return found
    return {}
