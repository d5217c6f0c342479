"""The fields of a chat request, and what a server turns out not to take.

Servers differ in small ways that only a refusal shows. What was learnt is kept, so that it costs one request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from polymodal.errors import ConfigError
from polymodal.generation.params import GenerationParams

_LIMITS = ("max_tokens", "max_completion_tokens")
"""Older servers know only the first; OpenAI's reasoning models refuse it and want the second."""


@dataclass(frozen=True)
class Accepts:
    """What a server takes, as far as is known."""

    limit: str = _LIMITS[0]  # The name of the most tokens to make
    stream_options: bool = True  # Whether a streamed answer may be asked to count its tokens
    zero_temperature: bool = True  # Whether temperature 0 may be asked for; reasoning models take nothing but their own


def learn(accepts: Accepts, refusal: str, body: Mapping[str, Any]) -> Accepts | None:
    """What to try next, after a refusal."""
    if "stream_options" in refusal and "stream_options" in body:
        return replace(accepts, stream_options=False)
    if "temperature" in refusal and body.get("temperature") == 0.0 and accepts.zero_temperature:
        return replace(accepts, zero_temperature=False)
    if accepts.limit in refusal:
        return replace(accepts, limit=_LIMITS[_LIMITS.index(accepts.limit) - 1])
    return None


def request_body(
    model: str,
    messages: list[dict[str, Any]],
    params: GenerationParams,
    accepts: Accepts,
    *,
    stream: bool,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """Write a request."""
    for name, off in (("top_k", 0), ("repetition_penalty", 1.0)):
        if getattr(params, name) != off:
            raise ConfigError(
                f"{name} is no part of OpenAI's API; leave it out, or give it in `extra` to a server that takes it"
            )
    body: dict[str, Any] = {"model": model, "messages": messages, accepts.limit: params.max_new_tokens}
    if params.temperature > 0 or accepts.zero_temperature:
        body["temperature"] = params.temperature
    if params.top_p != 1.0:
        body["top_p"] = params.top_p
    if params.seed is not None:
        body["seed"] = params.seed
    if stops := [text for text in params.stop if text]:
        body["stop"] = stops
    if stream:
        body["stream"] = True
        if accepts.stream_options:
            body["stream_options"] = {"include_usage": True}
    return body | dict(extra)
